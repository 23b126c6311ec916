"""The two layouts of a judged picture as a JSON record, and how the released code reads its own.

    {"image": "17.png", "prompt": "a red circle", "size": [64, 64], "layout": 0.8, "overall": 0.6,
     "regions": [{"box": [4, 4, 28, 28], "score": 0.9, "name": "red circle"}, ...]}       and optionally "good_image"

    {"bad_image_file": "17.png", "good_image_file": "17.png", "prompt": "a red circle", "vlm_rewards": [
       {"object": "global_layout_reward", "bbox": [0, 0, 64, 64], "score": 0.8, "reason": "..."},
       {"object": "red circle", "bbox": [4, 4, 28, 28], "score": 0.9}, ...]}              as released

The released records hold no size; the box of the layout covers the whole picture, and its right and bottom edge are
taken for it where it is not empty.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from megabagel.rewards.regions import (
    BadReward,
    Box,
    Region,
    Reward,
    read_optional_score,
    read_regions,
    read_score,
    read_size,
)

LAYOUT_OBJECT = "global_layout_reward"
"""Name of the entry of the layout score among the released `vlm_rewards`."""
OVERALL_OBJECT = "overall_reward"
"""Name of the entry of the whole picture's score; ours, since the released training code cannot read it."""

OWN = ("image", "prompt", "regions")
RELEASED = ("bad_image_file", "good_image_file", "prompt", "vlm_rewards")
"""Required fields of the layouts."""


def read_own(record: Mapping[str, Any]) -> Reward:
    """The reward of a record of the layout `OWN`. Raises BadReward."""
    return Reward(
        read_regions("regions", record["regions"], "box", "score", "name"),
        read_optional_score("layout", record.get("layout")),
        read_optional_score("overall", record.get("overall")),
        read_size("size", record.get("size")),
    )


def read_released(record: Mapping[str, Any]) -> Reward:
    """The reward of a record of the layout `RELEASED`, strictly. Raises BadReward."""
    entries = record["vlm_rewards"]
    if not isinstance(entries, list):
        raise BadReward("reward: not a list of regions", f"vlm_rewards: {entries!r:.80}")
    special: dict[str, Mapping[str, Any]] = {}
    regions = []
    for number, entry in enumerate(entries):
        name = entry.get("object") if isinstance(entry, Mapping) else None
        if name not in (LAYOUT_OBJECT, OVERALL_OBJECT):
            regions += [entry]
        elif name in special:
            raise BadReward("reward: two layout scores", f"vlm_rewards[{number}]: a second {name}")
        else:
            special[name] = entry
    layout, overall = (
        read_score(f"vlm_rewards.{name}.score", special[name].get("score")) if name in special else None
        for name in (LAYOUT_OBJECT, OVERALL_OBJECT)
    )
    size = _size_of(special.get(LAYOUT_OBJECT, {}).get("bbox"))
    return Reward(read_regions("vlm_rewards", regions, "bbox", "score", "object"), layout, overall, size)


def _size_of(box: object) -> tuple[int, int] | None:
    match box:
        case [0, 0, int(width), int(height)] if width > 0 and height > 0:
            return width, height
    return None


def to_released(reward: Reward, image: str, prompt: str, good_image: str | None = None) -> dict[str, Any]:
    """A training record of the layout `RELEASED`.

    Args:
        reward: its scores; an absent layout score makes no entry.
        image: file name of the judged picture.
        prompt: its prompt.
        good_image: file name of the picture that the constraint pulls towards; None: the judged one.
    """
    whole = [0, 0, *(reward.size or (0, 0))]
    special = {LAYOUT_OBJECT: reward.layout, OVERALL_OBJECT: reward.overall}
    entries: list[dict[str, Any]] = [
        {"object": name, "bbox": whole, "score": score} for name, score in special.items() if score is not None
    ]
    entries += [{"object": r.name, "bbox": list(r.box), "score": r.score} for r in reward.regions]
    return {
        "bad_image_file": image,
        "good_image_file": good_image or image,
        "prompt": prompt,
        "vlm_rewards": entries,
    }


def as_released(entries: Sequence[Mapping[str, Any]]) -> Reward:
    """The reward that the released loader makes of `vlm_rewards`, for comparison with it; training reads strictly.

    Edges are cut to integers, digits in strings pass; a box that is not four numbers or is empty is dropped; a missing
    score counts as 0, a missing layout score as none (alpha = 0.5); nothing is clamped to [-1, 1].

    Raises:
        TypeError: a score is null or a text; the released loader loses the record.
    """
    layout: float | None = None
    regions = []
    for entry in entries:
        score = entry.get("score", 0.0)
        if entry.get("object") == LAYOUT_OBJECT:
            layout = _number(score)
        elif (box := _lenient_box(entry.get("bbox"))) is not None:
            regions.append(Region(box, _number(score)))
    return Reward(tuple(regions), layout)


def _number(score: object) -> float:
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise TypeError(f"score: {score!r}")
    return float(score)


def _lenient_box(value: object) -> Box | None:
    try:
        left, top, right, bottom = map(int, value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        return None
    return (left, top, right, bottom) if left < right and top < bottom else None
