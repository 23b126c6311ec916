"""Classifier-free guidance on text and on images, and the norm that keeps guided velocities in bounds.

Formulas of the released sampler (BAGEL section 4; names as in its arguments `cfg_text_scale`, `cfg_img_scale`,
`cfg_interval`, `cfg_renorm_type`, `cfg_renorm_min`). Shapes: L latent tokens of one picture, Z numbers of each.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from megabagel.errors import UserError

Renorm = Literal["global", "channel", "text_channel"]
_TINY = 1e-8
"""Added to the norm that is divided by."""


@dataclass(frozen=True)
class Guidance:
    """Settings of one picture."""

    text_scale: float = 4.0
    """s: 1 or less switches all guidance off."""
    image_scale: float = 1.0
    """r: 1 or less leaves out the image-free branch."""
    interval: tuple[float, float] = (0.4, 1.0)
    """Timesteps lo < t <= hi are guided."""
    renorm: Renorm = "global"
    """Norms are taken over the whole picture, over each token, or over each token before image guidance."""
    renorm_min: float = 0.0
    """Least factor of renormalization; 1 switches it off."""

    def __post_init__(self) -> None:
        if self.renorm not in get_args(Renorm):
            raise UserError(f"cfg_renorm_type={self.renorm!r}: expected one of {', '.join(get_args(Renorm))}")
        if not 0 <= self.renorm_min <= 1:
            raise UserError(f"cfg_renorm_min={self.renorm_min}: expected a number from 0 to 1 (1: no renormalization)")

    def scales(self, t: float | np.floating) -> tuple[float, float]:
        """(s, r) in force at timestep `t`; compared in float32, as `t` is a value of a float32 grid."""
        lo, hi = np.float32(self.interval[0]), np.float32(self.interval[1])
        return (self.text_scale, self.image_scale) if lo < np.float32(t) <= hi else (1.0, 1.0)


def extrapolated(without: Tensor, towards: Tensor, scale: float) -> Tensor:
    """Linear extrapolation from `without` through `towards`: `towards` at scale 1, beyond it above 1."""
    return without + scale * (towards - without)


def guide(
    v: Tensor, v_text: Tensor | None, v_image: Tensor | None, scales: tuple[float, float], how: Guidance
) -> Tensor:
    """The guided velocity [L, Z].

    Args:
        v: velocity with all conditions [L, Z].
        v_text: without the text [L, Z]; None where s <= 1.
        v_image: without the images [L, Z]; None where r <= 1.
        scales: (s, r) in force, from `Guidance.scales`.
        how: renormalization.
    """
    text_scale, image_scale = scales
    if text_scale <= 1:
        return v
    assert v_text is not None
    guided = extrapolated(v_text, v, text_scale)
    if how.renorm == "text_channel":
        guided = _renormed(guided, v, how)
    if image_scale > 1:
        assert v_image is not None
        guided = extrapolated(v_image, guided, image_scale)
    return guided if how.renorm == "text_channel" else _renormed(guided, v, how)


def _renormed(guided: Tensor, v: Tensor, how: Guidance) -> Tensor:
    """Scale `guided` down to the norm of the conditional velocity `v` where it is longer; it is never scaled up."""
    if how.renorm == "global":
        ratio = v.norm() / (guided.norm() + _TINY)
    else:
        ratio = v.norm(dim=-1, keepdim=True) / (guided.norm(dim=-1, keepdim=True) + _TINY)
    return guided * ratio.clamp(how.renorm_min, 1.0)


def branches(scales: tuple[float, float]) -> tuple[bool, bool]:
    """Whether the velocities without text and without images are needed; nothing is guided where s <= 1."""
    text_scale, image_scale = scales
    return text_scale > 1, text_scale > 1 and image_scale > 1


def unconditional_is_needed(how: Guidance, grid: np.ndarray) -> tuple[bool, bool]:
    """Whether any step of a timestep grid needs the text-free, and the image-free context."""
    needed = [branches(how.scales(t)) for t in grid[:-1]]
    return any(text for text, _ in needed), any(image for _, image in needed)
