"""A checkpoint of ours that answers through the inference engine; its requests run as one batch."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from megabagel.chat_client import Completion
from megabagel.curation.models.seam import Question, prompt
from megabagel.data.decode.headers import decode
from megabagel.errors import UserError


class OwnChat:
    """A loaded model; greedy decoding."""

    def __init__(self, checkpoint: Path) -> None:
        from megabagel.inference.api import load_pretrained

        self._model = load_pretrained(checkpoint)

    @property
    def name(self) -> str:
        """Kind and digest of the weights."""
        return f"checkpoint {self._model.source.digest[:12]}"

    def answers(self, questions: Sequence[Question]) -> Iterator[tuple[int, Completion]]:
        """See `seam.Chat`. Raises UserError if a question does not fit."""
        asked = []
        for question in questions:
            parts = [part if isinstance(part, str) else decode(part) for part in question.parts]
            asked.append(
                self._model.submit_answer([prompt(question.prompt), *parts], max_new_tokens=question.max_tokens)
            )
        for number, request in enumerate(asked):
            for _ in self._model.stream(request):
                pass
            if request.done is None or request.done.error is not None:
                raise UserError(f"models.chat {self.name}: {request.done and request.done.error}")
            yield number, Completion(self._model.tokenizer.decode(request.done.result))
