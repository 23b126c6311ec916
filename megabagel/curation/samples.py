"""From drafts to shards (the conventions of megabagel/data/formats/samples.py)."""

import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from megabagel.curation.draft import Draft, Picture, Text
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
    entries: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    for item in draft.items:
        if isinstance(item, Picture):
            assert item.data is not None, f"{draft.key}: {item.source} was not filtered"
            name = f"{len(files)}.{extension(item.data)}"
            files[name] = item.data
            if item.frame:
                _add_frame(entries, name)
            else:
                role = item.role or ("target" if entries else "condition")
                entries.append({"type": "image", "name": name, "role": role})
        elif isinstance(item, Text) and any(letter.isalnum() for letter in item.text):
            entries.append({"type": "text", "text": item.text.strip(), "role": item.role or "target"})
    return draft.key, {"json": json.dumps({"items": entries}, ensure_ascii=False).encode(), **files}


def _add_frame(entries: list[dict[str, Any]], name: str) -> None:
    """Append a frame to the clip before it; an image before it becomes the first frame of a clip."""
    before = entries[-1]
    if before["type"] == "image":
        entries[-1] = before = {"type": "video", "frames": [before["name"]], "role": before["role"]}
    before["frames"].append(name)


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
    return draft.key, {extension(picture.data): picture.data, "txt": draft.text.encode()}


def extension(data: bytes) -> str:
    """Extension of an image file by its content."""
    format = Image.open(io.BytesIO(data)).format
    assert format is not None
    return {"JPEG": "jpg", "TIFF": "tif"}.get(format, format.lower())


LAYOUTS: Mapping[str, Callable[[Draft], Iterable[Sample]]] = {
    "interleaved": lambda draft: [interleaved(draft)],
    "captioned": lambda draft: [captioned(draft)],
    "texts": lambda draft: text_parts(draft, 2000),
}
"""How the documents of a recipe become samples: `write.layout`."""
