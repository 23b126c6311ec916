"""Weights of a pack's latent tokens from the scores of its judged pictures (task `reward`)."""

from collections.abc import Mapping

import numpy as np

from megabagel.config.schema import RewardConfig
from megabagel.data.documents import Document, ImageItem, SampleError, TextItem
from megabagel.data.index.index import Index
from megabagel.data.plan.planned_sample import Task
from megabagel.rewards.regions import Reward
from megabagel.rewards.weights import TokenWeights, token_weights
from megabagel.sequence.pack import Pack
from megabagel.sequence.rank_rows import LatentWeights
from megabagel.sequence.sample import LatentImage

Unscored = dict[int, tuple[int, SampleError]]
"""By sample number: slot and error of scores that cannot be read."""


def latent_weights(
    task: Task, pack: Pack, indexes: Mapping[str, Index], rules: RewardConfig
) -> tuple[LatentWeights | None, Unscored]:
    """Weights of all latent tokens of a pack.

    Args:
        task: the pack's documents and visits.
        pack: its layout.
        indexes: index of every source, read for the scores.
        rules: `config.reward`.

    Returns:
        (weights, or None where no document has scores; samples whose scores cannot be read). Tokens of other tasks
        weigh 1, those of an unreadable sample 0.
    """
    if not any(_scores(document) for document in task.documents):
        return None, {}
    unscored: Unscored = {}
    flow, constraint = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
    for number, (document, sample) in enumerate(zip(task.documents, pack.samples, strict=True)):
        found = _scores(document)
        for image in sample.latents:
            tokens, ones = image.rows * image.cols, np.ones(image.rows * image.cols, np.float32)
            if found is None:
                both = ones, 0 * ones
            else:
                slot, item = found
                try:
                    reward = Reward.from_json(indexes[sample.key.source].text(item))
                    both = _split(token_weights(reward, _size(document, image), (image.rows, image.cols), rules), image)
                except SampleError as error:
                    unscored[number] = slot, error
                    both = 0 * ones, 0 * ones
            assert len(both[0]) == tokens
            flow.append(both[0])
            constraint.append(both[1])
    paired = any(image.constraint_slot is not None for image in pack.latents)
    return LatentWeights(np.concatenate(flow), np.concatenate(constraint) if paired else None), unscored


def _split(weights: TokenWeights, image: LatentImage) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the first and of the second target; where there is one picture the first has both terms."""
    if image.constraint_slot is None:
        return weights.total_L, np.zeros_like(weights.reward_L)
    return weights.reward_L, np.full_like(weights.reward_L, weights.constraint)


def _scores(document: Document) -> tuple[int, TextItem] | None:
    for slot, item in enumerate(document.items):
        if isinstance(item, TextItem) and item.role == "reward":
            return slot, item
    return None


def _size(document: Document, image: LatentImage) -> tuple[int, int]:
    item = document.items[image.slot]
    assert isinstance(item, ImageItem)
    return item.height, item.width
