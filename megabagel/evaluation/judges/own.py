"""A checkpoint of ours as a judge: it is shown the question's images and texts, and decodes greedily."""

from megabagel.errors import UserError
from megabagel.evaluation.judges.judge import Reply
from megabagel.evaluation.suite import Request
from megabagel.inference.api import Pipeline


class Own:
    """A loaded model."""

    def __init__(self, model: Pipeline) -> None:
        self._model = model

    @property
    def name(self) -> str:
        """Kind and digest of the weights."""
        return f"model {self._model.source.digest[:12]}"

    def __call__(self, request: Request) -> Reply:
        """Decode an answer. Raises UserError if the question does not fit."""
        texts = [request.system] if request.system else []
        items = [part if isinstance(part, str) else self._model.open(part) for part in request.parts]
        asked = self._model.submit_answer([*texts, *items], max_new_tokens=request.max_tokens)
        for _ in self._model.stream(asked):
            pass
        if asked.done is None or asked.done.error is not None:
            raise UserError(f"judge {self.name}: {asked.done and asked.done.error}")
        return Reply(self._model.tokenizer.decode(asked.done.result))
