"""Learning rate by step (docs/bagel.md#learning-rate)."""

import math

from megabagel.config.schema import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step`, counted from 0: linear warm-up (step 0 runs with rate 0), then constant or cosine."""
    if step < config.warmup:
        return config.lr * step / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = min((step - config.warmup) / max(1, config.steps - config.warmup), 1.0)
    floor = config.min_lr / config.lr
    return config.lr * (0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor) + floor)
