"""Records of judged pictures (`rewards/records.py`): prompt, picture, scores, and a second target where there is one.

The scores become a text of role `reward` that holds numbers alone, so that the index stores, locates and checks them
as it does captions. Whatever is wrong with them is found when the source is indexed, not in a training step.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megabagel.data.documents import SampleError
from megabagel.data.formats.declared import Declared, DeclaredText, Locate, image_field, text_field
from megabagel.rewards.records import OWN, RELEASED, read_own, read_released
from megabagel.rewards.regions import BadReward, Reward

__all__ = ["OPTIONAL", "OWN", "RELEASED", "judged", "judged_as_released"]

OPTIONAL = ("size", "layout", "overall", "good_image")
"""Optional fields of the layout `OWN`."""


def judged(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of a record of the layout `OWN`."""
    yield from _items(record, locate, ("image", "good_image"), lambda: read_own(record))


def judged_as_released(record: Mapping[str, Any], locate: Locate) -> Iterator[Declared]:
    """Items of a record of the layout `RELEASED`."""
    yield from _items(record, locate, ("bad_image_file", "good_image_file"), lambda: read_released(record))


def _items(record: Mapping[str, Any], locate: Locate, images: tuple[str, str], read: Any) -> Iterator[Declared]:
    bad, good = images
    yield DeclaredText(text_field("prompt", record["prompt"]), "condition")
    yield image_field(bad, record[bad], locate, "target")
    # The same file twice, as in all released data, is one picture with one latent.
    if record.get(good) not in (None, record[bad]):
        yield image_field(good, record[good], locate, "constraint")
    try:
        reward: Reward = read()
    except BadReward as error:
        raise SampleError(error.reason, error.detail) from error
    yield DeclaredText(reward.to_json(), "reward")
