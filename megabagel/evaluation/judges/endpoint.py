"""A judge behind an OpenAI-compatible `chat/completions` endpoint (`megabagel/chat_client.py`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.chat_client import ChatClient, chat_messages
from megabagel.evaluation.judges.judge import Reply
from megabagel.evaluation.suite import Request

KEYS = ("MEGABAGEL_JUDGE_KEY", "OPENAI_API_KEY")
"""Environment variables with the key, in order; a local endpoint may need none."""


@dataclass
class Endpoint(ChatClient):
    """An OpenAI-compatible endpoint."""

    keys: tuple[str, ...] = KEYS
    role: str = "judge"
    kept: str = "Everything judged so far is kept"

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"endpoint {self.model}"

    def __call__(self, request: Request) -> Reply:
        """Ask. Raises UserError for a refusal, TransientFailure after the last try."""
        found = self.complete(messages(request), request.max_tokens)
        return Reply(found.text, found.prompt_tokens, found.answer_tokens, found.cost)


def messages(request: Request) -> list[dict[str, Any]]:
    """The chat messages of a question: images as data URLs."""
    parts = [part if isinstance(part, str) else (_kind(part), part.read_bytes()) for part in request.parts]
    return chat_messages(request.system, parts)


def _kind(path: Path) -> str:
    return {".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}.get(path.suffix.lower(), "png")
