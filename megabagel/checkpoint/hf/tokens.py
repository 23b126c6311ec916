"""Whether a folder's tokenizer fits a model's vocabulary (docs/bagel.md#special-tokens)."""

from pathlib import Path

from megabagel.checkpoint.hf.folder import read_json
from megabagel.errors import UserError
from megabagel.sequence.items import SPECIAL_TOKENS


def check_tokenizer(folder: Path, vocab: int) -> None:
    """Raise UserError if a folder has a tokenizer that lacks a special token or gives ids beyond the embedding's rows.

    A folder without tokenizer is fine.
    """
    found = _vocabulary(folder)
    if found is None:
        return
    file, ids = found
    for token in SPECIAL_TOKENS:
        if token not in ids:
            raise UserError(
                f"{file}: the vocabulary has no token {token}; expected {', '.join(SPECIAL_TOKENS)}, which bracket "
                "texts and images. Give the tokenizer that belongs to the weights."
            )
    token, highest = max(ids.items(), key=lambda entry: entry[1])
    if highest >= vocab:
        raise UserError(
            f"{file}: token {token!r} has id {highest}, but the model's vocabulary has {vocab} rows, ids 0 to "
            f"{vocab - 1}. Give the tokenizer that belongs to the weights."
        )


def _vocabulary(folder: Path) -> tuple[Path, dict[str, int]] | None:
    """(file, ids by token) from `tokenizer.json`, else from `vocab.json` and the files that add to it."""
    for read, file in ((_fast, folder / "tokenizer.json"), (_slow, folder / "vocab.json")):
        if file.is_file():
            try:
                return file, read(file)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{file}: no vocabulary can be read from it ({error!r}). Copy the file again."
                ) from error
    return None


def _fast(file: Path) -> dict[str, int]:
    content = read_json(file)
    words = content["model"]["vocab"]
    ids = dict(words) if isinstance(words, dict) else {word: number for number, (word, _) in enumerate(words)}
    return ids | {added["content"]: int(added["id"]) for added in content.get("added_tokens", ())}


def _slow(file: Path) -> dict[str, int]:
    ids = {word: int(number) for word, number in read_json(file).items()}
    more, config = file.with_name("added_tokens.json"), file.with_name("tokenizer_config.json")
    if more.is_file():
        ids |= {word: int(number) for word, number in read_json(more).items()}
    if config.is_file():
        added = read_json(config).get("added_tokens_decoder", {})
        ids |= {about["content"]: int(number) for number, about in added.items()}
    return ids
