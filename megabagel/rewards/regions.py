"""Regions of a picture with their scores, as SRUM's judge gives them, and strict reading of both from JSON.

`Reward` is what training needs of a judged picture. Reading refuses whatever would silently change a weight: a box
outside of the picture, a score of 95 where a model answered in percent, boxes that belong to another picture size.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels, half open."""

MOST_REGIONS = 1024
"""Most regions of one record; the released pipeline keeps 10."""


class BadReward(ValueError):
    """A record that cannot be used as a reward.

    Args:
        reason: short, and identical for all records with the same fault: records are counted by it.
        detail: the field and the value at fault.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} ({detail})")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Region:
    """A box and its score in [-1, 1]; `name` is what the judge saw there."""

    box: Box
    score: float
    name: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reward:
    """All scores of one picture; None where the judge gave none."""

    regions: tuple[Region, ...]
    layout: float | None = None
    """Score of the arrangement, the global reward (SRUM section 3.2)."""
    overall: float | None = None
    """Score of the whole picture, for the ablation `reward.level=picture`."""
    size: tuple[int, int] | None = None
    """Width and height in pixels of the picture that was judged."""

    def to_json(self) -> str:
        """Numbers alone, in one line; `from_json` reads it back."""
        value: dict[str, Any] = {"regions": [[*region.box, region.score] for region in self.regions]}
        value |= {"layout": self.layout, "overall": self.overall, "size": self.size}
        return json.dumps({name: entry for name, entry in value.items() if entry is not None})

    @classmethod
    def from_json(cls, text: str) -> "Reward":
        """The reward that `to_json` wrote."""
        value = json.loads(text)
        regions = tuple(Region((a, b, c, d), score) for a, b, c, d, score in value["regions"])
        size = tuple(value["size"]) if "size" in value else None
        return cls(regions, value.get("layout"), value.get("overall"), size)

    def check_size(self, width: int, height: int) -> None:
        """Compare with the size in pixels of the picture at hand.

        Raises:
            BadReward: the picture was judged at another size, or a box does not lie inside it.
        """
        if self.size not in (None, (width, height)):
            assert self.size is not None
            judged = "{} x {}".format(*self.size)
            raise BadReward("reward: judged at another picture size", f"{judged}, the file has {width} x {height}")
        for number, region in enumerate(self.regions):
            left, top, right, bottom = region.box
            if left < 0 or top < 0 or right > width or bottom > height:
                where = f"regions[{number}]: {list(region.box)}"
                raise BadReward("reward: box outside of the picture", f"{where}, the file has {width} x {height}")


def read_box(where: str, value: object) -> Box:
    """A box of four numbers; fractions are cut off. Raises BadReward for anything else or an empty box."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 4:
        raise BadReward("reward: not a box", f"{where}: expected [left, top, right, bottom], got {value!r:.80}")
    for edge in value:
        if isinstance(edge, bool) or not isinstance(edge, int | float) or not abs(edge) < 2**31:
            raise BadReward("reward: not a box", f"{where}: expected four numbers, got {value!r:.80}")
    left, top, right, bottom = (int(edge) for edge in value)
    if left >= right or top >= bottom:
        raise BadReward("reward: empty box", f"{where}: {value!r:.80} has no pixel")
    return left, top, right, bottom


def read_score(where: str, value: object) -> float:
    """A score in [-1, 1]. Raises BadReward for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadReward("reward: not a score", f"{where}: expected a number from -1 to 1, got {value!r:.80}")
    if not -1 <= value <= 1:
        raise BadReward("reward: score out of range", f"{where}: expected a number from -1 to 1, got {value!r:.80}")
    return float(value)


def read_optional_score(where: str, value: object) -> float | None:
    """A score, or None for null: a judge that failed."""
    return None if value is None else read_score(where, value)


def read_size(where: str, value: object) -> tuple[int, int] | None:
    """Width and height, or None for null. Raises BadReward for anything else."""
    if value is None:
        return None
    match value:
        case [int(width), int(height)] if 0 < width < 2**31 and 0 < height < 2**31:
            return width, height
    raise BadReward("reward: not a size", f"{where}: expected [width, height], got {value!r:.80}")


def read_regions(where: str, value: object, box: str, score: str, name: str) -> tuple[Region, ...]:
    """A list of regions.

    Args:
        where: name of the field, for messages.
        value: JSON value of the field.
        box: key of the box of each entry.
        score: key of its score.
        name: key of its name, which may be absent.

    Raises:
        BadReward: an entry is unusable; nothing is dropped silently.
    """
    if not isinstance(value, list):
        raise BadReward("reward: not a list of regions", f"{where}: {value!r:.80}")
    if len(value) > MOST_REGIONS:
        raise BadReward("reward: too many regions", f"{where}: {len(value):,}; at most {MOST_REGIONS:,} are read")
    regions = []
    for number, entry in enumerate(value):
        at = f"{where}[{number}]"
        if not isinstance(entry, Mapping):
            raise BadReward("reward: not a region", f"{at}: expected an object, got {entry!r:.80}")
        found_box, found_score = read_box(f"{at}.{box}", entry.get(box)), read_score(f"{at}.{score}", entry.get(score))
        regions.append(Region(found_box, found_score, str(entry.get(name) or "")))
    return tuple(regions)
