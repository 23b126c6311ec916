"""The interface of judges, and the identity of a question."""

import hashlib
import json
from dataclasses import dataclass
from typing import Protocol

from megabagel.evaluation.suite import Request


@dataclass(frozen=True)
class Reply:
    """An answer, with the tokens that it took and its price."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0


class Judge(Protocol):
    """Answers questions. One evaluation has one judge; its name is part of the evaluation's identity."""

    @property
    def name(self) -> str:
        """Kind and model, such as `endpoint gpt-4o`; no secret, no address."""

    def __call__(self, request: Request) -> Reply:
        """Answer a question. Raises UserError where no answer can be had at all."""


def request_digest(request: Request) -> str:
    """Identity of a question: its texts and the bytes of its images, not their paths."""
    parts = [
        part if isinstance(part, str) else {"sha256": hashlib.sha256(part.read_bytes()).hexdigest()}
        for part in request.parts
    ]
    content = [request.criterion, request.system, parts, request.max_tokens]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:32]
