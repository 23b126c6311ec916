"""Strict reading of judged records: every bad value is refused by a reason that is counted."""

from typing import Any

import pytest

from megabagel.rewards.records import read_own, read_released, to_released
from megabagel.rewards.regions import BadReward, Region, Reward

OWN = {
    "image": "a.png",
    "prompt": "p",
    "size": [64, 48],
    "layout": 0.5,
    "regions": [{"box": [0, 0, 8, 8], "score": -0.25, "name": "cat"}],
}
RELEASED = {
    "bad_image_file": "a.png",
    "good_image_file": "a.png",
    "prompt": "p",
    "vlm_rewards": [
        {"object": "global_layout_reward", "bbox": [0, 0, 64, 48], "score": 0.5, "reason": "r"},
        {"object": "cat", "bbox": [0, 0, 8.9, 8], "score": -0.25},
    ],
}
SAME = Reward((Region((0, 0, 8, 8), -0.25),), 0.5, None, (64, 48))


def test_both_layouts_hold_the_same() -> None:
    assert read_own(OWN) == read_released(RELEASED) == SAME
    assert Reward.from_json(SAME.to_json()) == SAME
    assert read_released(to_released(SAME, "a.png", "p")) == SAME
    assert read_own({"regions": []}) == Reward(()) == Reward.from_json(Reward(()).to_json())


def test_a_failed_layout_is_none_and_an_honest_zero_is_zero() -> None:
    assert read_own({**OWN, "layout": None}).layout is None
    assert read_own({**OWN, "layout": 0}).layout == 0.0
    zero = Reward((), 0.0, size=(8, 8))
    assert read_released(to_released(zero, "a", "p")) == zero


def region(**changes: Any) -> dict[str, Any]:
    return {**OWN, "regions": [{"box": [0, 0, 8, 8], "score": 0.5, **changes}]}


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (region(box=["1", "2", "3", "4"]), "reward: not a box", "regions[0].box: expected four numbers"),
        (region(box=[1, 2, 3]), "reward: not a box", "regions[0].box"),
        (region(box="1234"), "reward: not a box", "regions[0].box"),
        (region(box=None), "reward: not a box", "got None"),
        (region(box=[0, 0, float("nan"), 4]), "reward: not a box", "four numbers"),
        (region(box=[0, 0, True, 4]), "reward: not a box", "four numbers"),
        (region(box=[4, 0, 4, 8]), "reward: empty box", "regions[0].box"),
        (region(box=[5, 0, 4, 8]), "reward: empty box", "no pixel"),
        (region(score=95.0), "reward: score out of range", "regions[0].score: expected a number from -1 to 1, got 95"),
        (region(score=-1.01), "reward: score out of range", "-1.01"),
        (region(score=None), "reward: not a score", "got None"),
        (region(score="0.5"), "reward: not a score", "'0.5'"),
        (region(score=float("inf")), "reward: not a score", "inf"),
        ({**OWN, "layout": 3}, "reward: score out of range", "layout"),
        ({**OWN, "overall": "good"}, "reward: not a score", "overall"),
        ({**OWN, "size": [64]}, "reward: not a size", "size"),
        ({**OWN, "regions": {}}, "reward: not a list of regions", "regions"),
        ({**OWN, "regions": [3]}, "reward: not a region", "regions[0]"),
    ],
)
def test_a_bad_record_is_refused(record: dict[str, Any], reason: str, detail: str) -> None:
    with pytest.raises(BadReward) as caught:
        read_own(record)
    assert caught.value.reason == reason and detail in caught.value.detail


def test_a_bad_released_record_is_refused() -> None:
    layout = RELEASED["vlm_rewards"][0]
    for entries, reason in (
        ([layout, layout], "reward: two layout scores"),
        ([{**layout, "score": 95}], "reward: score out of range"),
        ([{"object": "a", "bbox": [0, 0, 1, 1]}], "reward: not a score"),
        ("none", "reward: not a list of regions"),
    ):
        with pytest.raises(BadReward) as caught:
            read_released({**RELEASED, "vlm_rewards": entries})
        assert caught.value.reason == reason


def test_boxes_belong_to_the_picture_at_hand() -> None:
    SAME.check_size(64, 48)
    with pytest.raises(BadReward, match=r"another picture size \(64 x 48, the file has 48 x 64\)"):
        SAME.check_size(48, 64)
    with pytest.raises(BadReward, match=r"box outside of the picture \(regions\[0\]: \[0, 0, 8, 8\], the file has 7"):
        Reward(SAME.regions).check_size(7, 8)
    with pytest.raises(BadReward, match="outside"):
        Reward((Region((-1, 0, 4, 4), 0.0),)).check_size(8, 8)
