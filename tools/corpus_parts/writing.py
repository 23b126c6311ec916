"""From drafts to shards (the conventions of megabagel/data/formats/samples.py)."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from corpus_parts.draft import Draft, Picture
from megabagel.data.files import staging
from megabagel.data.formats.shards import write_shards
from megabagel.errors import UserError

Sample = tuple[str, dict[str, bytes]]
"""Key, and {extension: bytes}."""


def write_corpus(out: Path, kinds: dict[str, Iterable[Sample]], samples_per_shard: int) -> list[Path]:
    """Write `out/KIND-000000.tar`, ... for every kind of samples; they appear when all are complete.

    Raises:
        UserError: `out` holds shards of a kind already, or cannot be written.
    """
    for kind in kinds:
        if old := sorted(out.glob(f"{kind}-*.tar")):
            raise UserError(f"{old[0]} exists already. Choose another folder, or remove the {len(old)} old shards.")
    try:
        with staging(out) as stage:
            paths = [
                p for kind, samples in kinds.items() for p in write_shards(stage, kind, samples, samples_per_shard)
            ]
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}). Make room or choose another."
        ) from error
    return [out / path.name for path in paths]


def interleaved(draft: Draft) -> Sample:
    """A document to learn as a whole: cross-entropy on every text, flow loss on every image, given what comes before.

    An image that nothing precedes is a condition: there is nothing to generate it from.
    """
    entries: list[dict[str, str]] = []
    files: dict[str, bytes] = {}
    for item in draft.items:
        if isinstance(item, Picture):
            assert item.data is not None, f"{draft.key}: {item.source} was not filtered"
            name = f"{len(files)}.{_extension(item.data)}"
            files[name] = item.data
            entries.append({"type": "image", "name": name, "role": "target" if entries else "condition"})
        elif any(letter.isalnum() for letter in item.text):
            entries.append({"type": "text", "text": item.text.strip(), "role": "target"})
    return draft.key, {"json": json.dumps({"items": entries}, ensure_ascii=False).encode(), **files}


def text_parts(draft: Draft, longest: int) -> Iterator[Sample]:
    """The text of a document alone, in parts of at most `longest` characters: whole paragraphs or words if they can."""
    parts: list[str] = []
    for paragraph in (piece for whole in draft.text.split("\n\n") for piece in _pieces(whole, longest)):
        if parts and len(parts[-1]) + len(paragraph) + 2 <= longest:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    for number, part in enumerate(parts):
        yield f"{draft.key}-{number}", {"txt": part.encode()}


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """A paragraph cut at white space where it is too long; a word longer than that is cut anywhere."""
    while len(paragraph) > longest:
        head = re.match(rf"(?s)\S.{{0,{longest - 1}}}(?=\s)", paragraph)
        end = head.end() if head else longest
        yield paragraph[:end].rstrip()
        paragraph = paragraph[end:].lstrip()
    if paragraph:
        yield paragraph


def captioned(draft: Draft) -> Sample:
    """A caption and its picture."""
    (picture,) = draft.pictures
    assert picture.data is not None, f"{draft.key}: {picture.source} was not filtered"
    return draft.key, {_extension(picture.data): picture.data, "txt": draft.text.encode()}


def _extension(data: bytes) -> str:
    format = Image.open(io.BytesIO(data)).format
    assert format is not None
    return {"JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())
