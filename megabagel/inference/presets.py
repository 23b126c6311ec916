"""Settings of the released programs by task, as data. `points` are grid points: 50 of them make 49 evaluations."""

from dataclasses import dataclass, field, replace
from typing import Any

from megabagel.errors import UserError
from megabagel.inference.decoding import TextSettings
from megabagel.inference.programs import DrawSettings
from megabagel.sampling.guidance import Guidance


@dataclass(frozen=True)
class Preset:
    """How pictures are sampled and how the thought before them is decoded."""

    draw: DrawSettings
    thought: TextSettings = field(default_factory=TextSettings)
    thought_in_image_free: bool = False
    """Whether the thought is a condition of the image-free branch too, as in the editing benchmarks."""


def _preset(s: float, r: float, lo: float, renorm: Any, **thought: Any) -> Preset:
    """A preset with the settings that all released programs share: shift 3, 50 points, renormalization from 0."""
    return Preset(DrawSettings(guidance=Guidance(s, r, (lo, 1.0), renorm, 0.0)), **thought)


_JUDGED = {"thought": TextSettings(max_new_tokens=2047, temperature=0.3), "thought_in_image_free": True}

PRESETS: dict[str, Preset] = {
    "notebook": _preset(4.0, 1.0, 0.4, "global"),
    "gradio": _preset(4.0, 1.5, 0.4, "global"),  # the menu passes no image scale, so the default of the sampler holds
    "edit": _preset(4.0, 2.0, 0.0, "text_channel"),
    "inferencer": _preset(3.0, 1.5, 0.4, "global"),
    "geneval": _preset(4.0, 1.0, 0.0, "global"),
    "wise": _preset(4.0, 1.0, 0.4, "global", thought=TextSettings(max_new_tokens=2047, temperature=0.3)),
    "gedit": _preset(4.0, 1.5, 0.4, "text_channel", **_JUDGED),
    "kris": _preset(4.0, 1.5, 0.0, "text_channel", **_JUDGED),
    "rise": _preset(4.0, 2.0, 0.0, "text_channel", **_JUDGED),
    "imgedit": _preset(4.0, 1.5, 0.0, "text_channel", **_JUDGED),
}
"""By name: the notebook and the web page of the release, its inferencer's defaults, and its benchmark scripts."""

DRAW, EDIT = "notebook", "edit"
"""Defaults for pictures from text and for edits."""


def preset(name: str) -> Preset:
    """A preset by name. Raises UserError for an unknown one."""
    if name not in PRESETS:
        raise UserError(f"preset {name!r}: expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def adjusted(base: DrawSettings, **changes: Any) -> DrawSettings:
    """Settings with those changes that are not None; names are fields of `DrawSettings` or of `Guidance`.

    Raises UserError for values that make no sense.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    guidance = {name: given.pop(name) for name in list(given) if name in Guidance.__dataclass_fields__}
    unknown = given.keys() - DrawSettings.__dataclass_fields__.keys()
    if unknown:
        known = [*DrawSettings.__dataclass_fields__, *Guidance.__dataclass_fields__]
        raise UserError(f"{sorted(unknown)[0]}: no setting of a picture; expected one of {', '.join(known)}")
    settings = replace(base, guidance=replace(base.guidance, **guidance), **given)
    if settings.points < 1:
        raise UserError(f"steps={settings.points}: expected at least 1 grid point (50 points are 49 evaluations)")
    if settings.shift <= 0:
        raise UserError(f"shift={settings.shift}: expected a number above 0")
    return settings
