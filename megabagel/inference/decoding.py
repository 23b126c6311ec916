"""The choice of the next token from logits: greedy, or a keyed draw at a temperature from the likeliest tokens."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megabagel.errors import UserError
from megabagel.sequence.keys import uniform


@dataclass(frozen=True)
class TextSettings:
    """How a text is decoded."""

    max_new_tokens: int = 1000
    """Tokens after bos, the closing eos not counted where the limit is not reached."""
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities reach this sum."""
    seed: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    """Texts, as ids, that end the decoding when they appear at the end; they stay in the output."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens}: expected at least 1")
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p}: expected a number above 0, at most 1")

    def stops(self, ids: list[int]) -> bool:
        """Whether the ids end with a stop text."""
        return any(tuple(ids[-len(text) :]) == text for text in self.stop if text)


def probabilities(logits_V: Tensor, temperature: float) -> Tensor:
    """Softmax of logits / temperature, fp32 [V]."""
    return torch.softmax(logits_V.float() / temperature, -1)


def choose(logits_V: Tensor, settings: TextSettings, number: int) -> int:
    """The id of token `number` of a text: a function of its own logits and seed, whatever else is decoded beside it."""
    if settings.temperature == 0:
        return int(logits_V.argmax())
    p_V = probabilities(logits_V, settings.temperature).double().cpu().numpy()
    order = np.argsort(-p_V, kind="stable")
    reached = np.cumsum(p_V[order])
    kept = int(np.searchsorted(reached, settings.top_p * reached[-1])) + 1
    drawn = uniform(settings.seed, "token", number) * reached[: min(kept, len(p_V))][-1]
    return int(order[np.searchsorted(reached, drawn, side="right")])
