"""Samples in folders of plain files, by kind: what `megabagel data prepare --kind` understands.

    captions    NAME.jpg + NAME.txt                                     a captioned image
    edits       NAME.0.jpg, NAME.1.jpg, ... + NAME.txt                  a chain of images; a line of text per step.
                NAME.input.jpg, NAME.output.jpg + NAME.txt              the same with one step
    questions   NAME.jpg + NAME.json                                    one {"question": ..., "answer": ...}, or a list
                questions.jsonl (or .json, a list) in the folder        the same with "image": path in the folder
    clips       NAME/*.jpg + NAME.txt (or a .txt in NAME/)              frames, by the numbers in their names

Each kind becomes a layout of `formats/records.py`. Hidden files and folders are ignored.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file, read_own
from megabagel.data.decode import measure
from megabagel.data.documents import SampleError
from megabagel.data.files import MAX_IMAGE_BYTES
from megabagel.data.formats.records import MAX_RECORD_BYTES, MAX_TEXT_BYTES, parse
from megabagel.data.formats.samples import IMAGE_EXTENSIONS, caption_text, looks_like_image
from megabagel.errors import UserError

Files = Mapping[str, bytes]
"""Files of one sample by extension, as a shard stores them."""


@dataclass(frozen=True)
class Unit:
    """A candidate for a sample: its place for reports, the stem of its key, and how to load its files."""

    name: str
    stem: str
    load: Callable[[], Files]
    """Raises SampleError if it cannot be used."""


@dataclass(frozen=True)
class Kind:
    """A kind of samples: how they are found in a folder, and words for messages."""

    counted: str
    """Name of the things that a report counts."""
    expected: str
    find: Callable[[Path], list[Unit]]


def _captions(folder: Path) -> list[Unit]:
    """Every image is a unit, with or without a caption."""
    return [
        Unit(str(path.relative_to(folder)), path.stem, partial(_captioned, path)) for path in sorted(_images(folder))
    ]


def _captioned(path: Path) -> Files:
    extension, image = _image(path)
    caption = _text(_beside(path.with_suffix("")), "no caption")
    # After the caption, which is quicker to find: decoding takes most of the time.
    measure(image, verify=True)
    return {extension: image, "txt": caption.encode()}


def _edits(folder: Path) -> list[Unit]:
    """Images that share a name up to its last two dots are a unit."""
    chains: dict[Path, dict[str, Path]] = {}
    for path in _images(folder):
        stem, dot, step = path.stem.rpartition(".")
        chains.setdefault(path.with_name(stem if dot else path.stem), {})[step] = path
    return [
        Unit(str(chain.relative_to(folder)), chain.name, partial(_edit, chain, steps))
        for chain, steps in sorted(chains.items())
    ]


def _edit(chain: Path, steps: Mapping[str, Path]) -> Files:
    """The chain in the layout `image_list` + `instruction_list`: roles, random starts and ends are those of edits."""
    ordered = _in_order(steps)
    if len(ordered) < 2:
        raise SampleError("fewer than two images", "expected NAME.0.jpg, NAME.1.jpg, ... or NAME.input.jpg and .output")
    text = _text(_beside(chain), "no instruction")
    lines = [text] if len(ordered) == 2 else [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) != len(ordered) - 1:
        raise SampleError("not a line per step", f"{len(lines)} lines for {len(ordered) - 1} steps")
    files = _numbered(ordered)
    record = {"image_list": list(files), "instruction_list": [[line] for line in lines]}
    return {"json": json.dumps(record).encode(), **files}


def _in_order(steps: Mapping[str, Path]) -> list[Path]:
    """Images of a chain in order: by number, or input before output."""
    if steps.keys() == {"input", "output"}:
        return [steps["input"], steps["output"]]
    if odd := sorted(name for name in steps if not name.isdecimal()):
        raise SampleError("images with unknown names", f"{odd[0]!r}; expected a number, or input and output")
    return [steps[name] for name in sorted(steps, key=int)]


TABLES = ("questions.jsonl", "questions.json")
"""Files of questions about all images of a folder."""


def _questions(folder: Path) -> list[Unit]:
    """Images that a table names, or else every image; its questions become one conversation."""
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        paths = sorted(_images(folder))
        beside = [
            (str(path.relative_to(folder)), partial(_read_json, path.with_suffix(".json"), "no questions"))
            for path in paths
        ]
    else:
        by_image: dict[str, list[Any]] = {}
        for row in _rows(table):
            by_image.setdefault(_named_image(table, row), []).append(row)
        beside = [(name, partial(_same, rows)) for name, rows in by_image.items()]
    return [Unit(name, Path(name).stem, partial(_conversation, folder, folder / name, asked)) for name, asked in beside]


def _conversation(folder: Path, path: Path, asked: Callable[[], Any]) -> Files:
    """An image and what is asked about it, in the layout `conversations`."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise SampleError("path leaves the image folder")
    rows = asked()
    turns = []
    for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
        match row:
            case {"question": str(question), "answer": str(answer)} if question.strip() and answer.strip():
                # The picture comes first, once; questions may not stand for pictures.
                shown = "" if number else "<image>"
                turns.append({"from": "human", "value": shown + re.sub("<(image|video)>", "", question).strip()})
                turns.append({"from": "gpt", "value": answer.strip()})
            case _:
                expected = '{"question": a text, "answer": a text}'
                raise SampleError("no question and answer", f"number {number}: expected {expected}, got {row!r:.80}")
    if not turns:
        raise SampleError("no questions")
    extension, image = _image(path)
    measure(image, verify=True)
    return {extension: image, "json": json.dumps({"conversations": turns, "image": extension}).encode()}


def _rows(table: Path) -> Sequence[Any]:
    """Rows of a table of questions. Raises UserError if the file is not one."""
    data = read_own(table, 2**30, "Expected JSONL, or a JSON list, of questions.")
    lines = data.splitlines() if table.suffix == ".jsonl" else [data]
    try:
        found = [parse(line) for line in lines if line.strip()]
    except SampleError as error:
        raise UserError(f"{table}: {error}. Expected JSONL, or a JSON list, of questions.") from error
    if table.suffix == ".json":
        (found,) = found or [[]]
    if not isinstance(found, list):
        raise UserError(f"{table}: expected a list of {{image, question, answer}}, got {found!r:.80}")
    return found


def _named_image(table: Path, row: Any) -> str:
    """Path of the image of a row. Raises UserError if there is none: what a table is about cannot be guessed."""
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "\0" in row["image"]:
        raise UserError(f'{table}: expected {{"image": path, "question": ..., "answer": ...}}, got {row!r:.80}')
    return str(row["image"])


def _clips(folder: Path) -> list[Unit]:
    """Every folder with images in it is a unit."""
    clips: dict[Path, list[Path]] = {}
    for path in _images(folder):
        clips.setdefault(path.parent, []).append(path)
    return [
        Unit(str(clip.relative_to(folder)), clip.name, partial(_clip, clip, frames))
        for clip, frames in sorted(clips.items())
    ]


def _clip(clip: Path, frames: list[Path]) -> Files:
    """A caption and frames to generate, in the layout `items`."""
    if len(frames) < 2:
        raise SampleError("fewer than two frames")
    inside = sorted(path for path in clip.iterdir() if path.suffix.lower() == ".txt" and path.name[0] != ".")
    if len(inside) > 1:
        raise SampleError("several captions", ", ".join(path.name for path in inside)[:80])
    caption = _text(inside[0] if inside else _beside(clip), "no caption")
    files = _numbered(sorted(frames, key=lambda path: _natural(path.name)))
    items = [{"type": "text", "text": caption}, {"type": "video", "frames": list(files), "role": "target"}]
    return {"json": json.dumps({"items": items}).encode(), **files}


KINDS: Mapping[str, Kind] = {
    "captions": Kind("images", "a caption in stem.txt", _captions),
    "edits": Kind("edits", "images NAME.0.jpg, NAME.1.jpg, ... and a NAME.txt with a line per step", _edits),
    "questions": Kind("images", "a NAME.json of questions and answers, or one questions.jsonl", _questions),
    "clips": Kind("clips", "a folder of frames and a caption NAME.txt for each clip", _clips),
}


def _images(folder: Path) -> Iterator[Path]:
    """Files under a folder that are images to pack or, if unusable, to count: by their extension or first bytes."""
    for path in folder.rglob("*"):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        extension = path.suffix[1:].lower()
        if extension in IMAGE_EXTENSIONS or (extension not in ("txt", "json", "jsonl") and _has_image_bytes(path)):
            yield path


def _has_image_bytes(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return looks_like_image(file.read(16))
    except OSError:
        return False


def _image(path: Path) -> tuple[str, bytes]:
    """Extension for the tar member, and bytes, of an image file; not decoded yet."""
    extension = path.suffix[1:].lower()
    return extension if extension in IMAGE_EXTENSIONS else "jpg", _read(path, MAX_IMAGE_BYTES, "image is missing")


def _numbered(paths: Sequence[Path]) -> dict[str, bytes]:
    """Verified images of a sample under the names 0.jpg, 1.jpg, ..."""
    files = {}
    for number, path in enumerate(paths):
        extension, image = _image(path)
        try:
            measure(image, verify=True)
        except SampleError as error:
            raise SampleError(error.reason, ": ".join(filter(None, (path.name, error.detail)))) from error
        files[f"{number}.{extension}"] = image
    return files


def _beside(stem: Path) -> Path:
    """Path of the text file of a stem; the extension may be in capitals, as cameras write names."""
    names = [stem.with_name(stem.name + extension) for extension in (".txt", ".TXT", ".Txt")]
    return next((name for name in names if name.is_file()), names[0])


def _text(path: Path, absent: str) -> str:
    return caption_text(_read(path, MAX_TEXT_BYTES, absent))


def _read_json(path: Path, absent: str) -> Any:
    return parse(_read(path, MAX_RECORD_BYTES, absent))


def _read(path: Path, most: int, absent: str) -> bytes:
    try:
        return read_file(path, most)
    except FileNotFoundError as error:
        raise SampleError(absent) from error
    except OSError as error:
        raise SampleError("cannot be read", str(error)) from error


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which frame_2 comes before frame_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _same(rows: list[Any]) -> list[Any]:
    return rows
