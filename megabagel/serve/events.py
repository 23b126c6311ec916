"""Events of a job, reported by the worker: plain values that cross from the engine's thread to the event loop."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from megabagel.serve.errors import ApiError


@dataclass(frozen=True)
class Accepted:
    """The engine has queued the job; tokens of its prompt, delimiters included."""

    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class TokenId:
    """A decoded token: of the answer, or of the thought before a picture."""

    id: int


@dataclass(frozen=True, eq=False)
class Preview:
    """Estimate of the finished picture at a denoising step."""

    number: int
    """Of the step, from 0."""
    of: int
    pixels: np.ndarray
    """uint8 [height, width, 3]."""


@dataclass(frozen=True, eq=False)
class Finished:
    """The result: ids of an answer, or a list of `Generated`."""

    result: Any
    output_tokens: int
    """Tokens of the answer, or of thought and pictures."""


@dataclass(frozen=True)
class Failed:
    """The job ended without a result."""

    error: ApiError


Event = Accepted | TokenId | Preview | Finished | Failed
