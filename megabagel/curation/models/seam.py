"""The seam to language models: a step asks questions in batches, and cannot tell which model answers.

Answers are cached by the digest of model, prompt, texts, images and token limit, so that a run that is started again,
or passes twice over its documents, pays once; the cache is also the account of what was paid.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

from megabagel.chat_client import ChatClient, Completion, chat_messages
from megabagel.curation.samples import extension
from megabagel.errors import UserError
from megabagel.journal import write_json

KEYS = ("MEGABAGEL_CURATE_KEY", "OPENAI_API_KEY")
"""Environment variables with the key of an endpoint, in order."""


@dataclass(frozen=True)
class Question:
    """A question to a model."""

    prompt: str
    """Name of its prompt file."""
    parts: tuple[str | bytes, ...]
    """Texts, and image files."""
    max_tokens: int

    def digest(self, model: str) -> str:
        """Identity of the question to a model: all texts, and the bytes of images."""
        shown = [part if isinstance(part, str) else {"sha256": hashlib.sha256(part).hexdigest()} for part in self.parts]
        content = [model, prompt(self.prompt), shown, self.max_tokens]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:32]


class Chat(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """Kind and model; no secret, no address."""

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        """Answers with the numbers of their questions, as they come. Raises UserError if there will be none."""


@dataclass
class EndpointChat:
    """An OpenAI-compatible endpoint, asked by several threads at a time."""

    client: ChatClient
    concurrency: int

    @property
    def name(self) -> str:
        """Kind and model."""
        return f"endpoint {self.client.model}"

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        """See `Chat`."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._ask, question): number for number, question in enumerate(questions)}
            try:
                for future in as_completed(asked):
                    yield asked[future], future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: Question) -> Completion:
        shown = [
            part if isinstance(part, str) else (extension(part).replace("jpg", "jpeg"), part) for part in question.parts
        ]
        return self.client.complete(chat_messages(prompt(question.prompt), shown), question.max_tokens)


class Models:
    """The models of a recipe, with their cache."""

    def __init__(self, chat: Chat, folder: Path) -> None:
        self.chat, self.folder = chat, folder
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> list[str]:
        """Answers in the order of the questions, from the cache where they are in it.

        Raises:
            UserError: the model refuses; TransientFailure if it is away. Answers that came are kept.
        """
        keys = [question.digest(self.chat.name) for question in questions]
        found = {key: text for key in keys if (text := self._cached(key)) is not None}
        # Equal questions are asked once.
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
        order = list(missing)
        for number, answer in self.chat.answers(list(missing.values())) if missing else ():
            key = order[number]
            record = {
                "prompt": missing[key].prompt,
                "model": self.chat.name,
                "text": answer.text,
                "tokens": [answer.prompt_tokens, answer.answer_tokens],
                "cost": answer.cost,
            }
            write_json(self._path(key), record)
            found[key] = answer.text
        return [found[key] for key in keys]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def _cached(self, key: str) -> str | None:
        try:
            return str(json.loads(self._path(key).read_bytes())["text"])
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_models(about: Mapping[str, Any], folder: Path) -> Models | None:
    """The models that a recipe names, None if it names none.

    Args:
        about: `models` of a checked recipe.
        folder: of the cache.

    Raises:
        UserError: a model has no address or cannot be loaded.
    """
    chat = about.get("chat")
    if chat is None:
        return None
    if chat["kind"] == "checkpoint":
        from megabagel.curation.models.own import OwnChat

        return Models(OwnChat(Path(chat["checkpoint"])), folder)
    if not chat["url"] or not chat["model"]:
        raise UserError("models.chat: expected url, such as http://HOST:8000/v1, and model, the name that it serves")
    prices = chat["prices"]
    client = ChatClient(
        chat["url"],
        chat["model"],
        chat["timeout"],
        rate=chat["rate"],
        prices=(float(prices[0]), float(prices[1])),
        keys=KEYS,
        role="models.chat",
    )
    return Models(EndpointChat(client, chat["concurrency"]), folder)


def prompt(name: str) -> str:
    """The text of a prompt file."""
    return files("megabagel.curation.models").joinpath("prompts", f"{name}.txt").read_text("utf-8").strip()


def usage(folder: Path) -> dict[str, dict[str, float]]:
    """What the answers of a cache took, by prompt: answers, tokens in, tokens out, cost."""
    total: dict[str, dict[str, float]] = {}
    for path in sorted(folder.glob("??/*.json")):
        record = json.loads(path.read_bytes())
        row = total.setdefault(record["prompt"], {"answers": 0, "tokens_in": 0, "tokens_out": 0, "cost": 0.0})
        row["answers"] += 1
        row["tokens_in"] += record["tokens"][0]
        row["tokens_out"] += record["tokens"][1]
        row["cost"] += record["cost"]
    return total
