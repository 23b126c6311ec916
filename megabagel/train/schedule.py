"""Learning-rate schedule (docs/bagel.md#learning-rate)."""

import math

from megabagel.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then constant or cosine decay.

    Args:
        config: `lr`, `min_lr`, `warmup`, `schedule` and `steps`.
        step: counted from 0; with a warm-up, step 0 has rate 0, as in the released schedule.
    """
    if step < config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((step - config.warmup) / max(1, config.steps - config.warmup), 1.0)
    floor = config.min_lr / config.lr
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor) + floor)
