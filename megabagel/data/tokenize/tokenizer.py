"""Tokenizers: one interface over Hugging Face `tokenizers`, sentencepiece and plain UTF-8 bytes.

The four special tokens delimit texts and images (docs/bagel.md#special-tokens). They enter a sequence by id only: if
the name of a special token occurs in a caption, it is encoded as ordinary text, so data cannot forge delimiters.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from megabagel.config.reading import read_file
from megabagel.errors import UserError
from megabagel.sequence.items import SPECIAL_TOKENS

MOST_BYTES = 2**28
"""Largest tokenizer file that is read; the largest published ones have some tens of megabytes."""


class TextTokenizer(Protocol):
    """Interface of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Rows that the token embedding needs: the highest id + 1."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""

    def token_id(self, token: str) -> int:
        """Id of one special token; KeyError if the vocabulary has none of this name."""

    def fingerprint(self) -> str:
        """Identifier that differs if two tokenizers may give different ids; stored in checkpoints and indexes."""


def load_tokenizer(spec: str) -> TextTokenizer:
    """Load a tokenizer.

    Args:
        spec: `data.tokenizer`: `bytes`, a `*.model` file, a `tokenizer.json`, or a folder with a `tokenizer.json`.

    Raises:
        UserError: the file is missing or cannot be read, or lacks one of the special tokens.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        path /= "tokenizer.json"
    kind = _KINDS.get(path.suffix)
    if kind is None or "\0" in spec or not path.is_file():
        raise UserError(
            f"data.tokenizer = {spec!r}: {'no such file: ' + str(path) if kind else 'unknown kind of tokenizer'}."
            " Expected `bytes`, a `tokenizer.json`, a folder with a `tokenizer.json`, or a sentencepiece `*.model`."
        )
    try:
        data = read_file(path, MOST_BYTES)
        if not data:
            raise ValueError("it is empty")
        tokenizer = kind(data)
    # Not narrower: both libraries raise bare Exception or RuntimeError, and a panic of the Rust library is a
    # BaseException (pyo3's PanicException).
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(
            f"data.tokenizer = {spec!r}: {path} is not a readable tokenizer ({error}). Copy or train the file again."
        ) from error
    missing = [token for token in SPECIAL_TOKENS if not _has(tokenizer, token)]
    if missing:
        raise UserError(
            f"data.tokenizer = {spec!r}: the vocabulary lacks {', '.join(missing)}. Every text and image is bracketed"
            " by special tokens: add them (tokenizers: special tokens; sentencepiece: control_symbols)."
        )
    return tokenizer


def _has(tokenizer: TextTokenizer, token: str) -> bool:
    try:
        tokenizer.token_id(token)
    except KeyError:
        return False
    return True


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, followed by the special tokens. Needs no file."""

    vocab_size = 256 + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out, invalid UTF-8 becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_id(self, token: str) -> int:
        """Id of one special token; KeyError if unknown."""
        return {token: 256 + number for number, token in enumerate(SPECIAL_TOKENS)}[token]

    def fingerprint(self) -> str:
        """A constant, since there is only one byte tokenizer."""
        return "bytes-1"


class JsonTokenizer:
    """A `tokenizer.json` of Hugging Face `tokenizers` (for example the byte-level BPE of Qwen2.5)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._model = tokenizers.Tokenizer.from_buffer(data)
        # BPE dropout in the file is switched off: the index counts the ids of a text once, and the count must not vary.
        if getattr(self._model.model, "dropout", None):
            self._model.model.dropout = None
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        # The library matches added tokens inside texts, except special ones while `encode_special_tokens` is on. A file
        # may have ours as merely added tokens, so they are first registered as special.
        self._model.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
        self._model.encode_special_tokens = True
        # The file may ask for truncation or padding; here lengths are decided by the planner.
        self._model.no_truncation()
        self._model.no_padding()
        self._fingerprint = f"tokenizers-{hashlib.sha256(data).hexdigest()}"
        self.vocab_size = max(vocabulary.values(), default=-1) + 1

    def __reduce__(self) -> tuple[type, tuple[bytes]]:
        """Pickle as the bytes of the file: the library's own pickling loses `encode_special_tokens`."""
        return JsonTokenizer, (self._data,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self._model.decode(list(ids), skip_special_tokens=True)

    def token_id(self, token: str) -> int:
        """Id of one special token; KeyError if the vocabulary has none of this name."""
        number = self._model.token_to_id(token)
        if number is None:
            raise KeyError(token)
        return number

    def fingerprint(self) -> str:
        """Digest of the file."""
        return self._fingerprint


class SentencePieceTokenizer:
    """A sentencepiece `*.model`."""

    def __init__(self, data: bytes) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self._special = {self._model.piece_to_id(token) for token in SPECIAL_TOKENS}
        self._fingerprint = f"sentencepiece-{hashlib.sha256(data).hexdigest()}"
        self.vocab_size = self._model.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""
        # The library matches a user-defined symbol anywhere in a text. Its name is cut in two before encoding, so that
        # it is encoded as ordinary text.
        return [number for part in _INSIDE_SPECIAL.split(text) for number in self._model.encode(part)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""
        return self._model.decode(
            [number for number in ids if 0 <= number < self.vocab_size and number not in self._special]
        )

    def token_id(self, token: str) -> int:
        """Id of one special token; KeyError if the vocabulary has none of this name."""
        # For an unknown piece the library returns the id of <unk> instead of an error.
        number = self._model.piece_to_id(token)
        if self._model.id_to_piece(number) != token:
            raise KeyError(token)
        return number

    def fingerprint(self) -> str:
        """Digest of the file."""
        return self._fingerprint


_KINDS: dict[str, Callable[[bytes], TextTokenizer]] = {".model": SentencePieceTokenizer, ".json": JsonTokenizer}

# Matches the empty string between the first and second character of a special token's name.
_INSIDE_SPECIAL = re.compile("(?<=<)(?=" + "|".join(re.escape(token[1:]) for token in SPECIAL_TOKENS) + ")")
