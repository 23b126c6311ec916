"""Text of a growing list of token ids, piece by piece, up to a stop text."""

from collections.abc import Sequence

from megabagel.data.tokenize.tokenizer import TextTokenizer

_REPLACEMENT = "\ufffd"
"""Output of a tokenizer for bytes that are not (yet) a character."""


class TextStream:
    """Decodes ids as they come; the pieces joined are the text of all ids, cut before the first stop text.

    Args:
        tokenizer: of the model.
        stops: texts that end the stream and are not part of it.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._start = self._read = 0
        """Ids from `_start` on are decoded again; those before `_read` have given their text."""
        self._held = ""
        """Text that may be the beginning of a stop text."""
        self.stopped = False
        """Whether a stop text came; nothing more is given then."""

    def push(self, token: int) -> str:
        """Add an id; returns the text that is certain now."""
        self._ids.append(token)
        new = self._decoded()
        # A character may be spread over several ids; until it is complete the text ends in U+FFFD.
        if not new or new.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._given(new, last=False)

    def finish(self) -> str:
        """The rest of the text, after the last id."""
        new = self._decoded()
        self._start = self._read = len(self._ids)
        return self._given(new, last=True)

    def _decoded(self) -> str:
        """Text of the ids since `_read`, decoded with the ids before them: some tokenizers join words by context."""
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        return self._tokenizer.decode(self._ids[self._start :])[len(before) :]

    def _given(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that are a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
