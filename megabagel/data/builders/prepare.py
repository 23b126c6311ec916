"""`megabagel data prepare`: packs a folder of captioned images into WebDataset shards."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.config.reading import read_file
from megabagel.data.decode import measure
from megabagel.data.documents import SampleError
from megabagel.data.files import MAX_IMAGE_BYTES, staging
from megabagel.data.formats.records import MAX_TEXT_BYTES
from megabagel.data.formats.samples import IMAGE_EXTENSIONS, caption_text, looks_like_image
from megabagel.data.formats.shards import write_shards
from megabagel.errors import UserError
from megabagel.locks import inside, locked


@dataclass(frozen=True)
class Picture:
    """A captioned image: the bytes of its file, the extension for the tar member, and the caption."""

    image: bytes
    extension: str
    caption: str


@dataclass(frozen=True)
class Report:
    """Result of `prepare`: counts, paths of the shards, and by reason the names of the images that were left out."""

    images: int
    samples: int
    shards: tuple[Path, ...]
    skipped: Mapping[str, Sequence[str]]

    def text(self, every: bool) -> str:
        """The report as text; with `every` it lists all skipped images, not only the first of each reason."""
        listed = [f"  {reason}: {name}" for reason, names in sorted(self.skipped.items()) for name in names]
        return "\n".join([str(self), *listed]) if every else str(self)

    def __str__(self) -> str:
        lost = self.images - self.samples
        lines = [f"images: {self.images}, samples: {self.samples}, skipped: {lost}, shards: {len(self.shards)}"]
        lines += [f"  {len(names)} x {reason}, first {names[0]}" for reason, names in sorted(self.skipped.items())]
        lines += [f"  {path}" for path in self.shards]
        return "\n".join(lines)


def prepare(images: Path, out: Path, *, samples_per_shard: int, name: str) -> Report:
    """Pack every image that has a caption `stem.txt` beside it into `out/name-000000.tar`, ...

    A file is an image by its extension or by its first bytes; hidden files and folders are ignored. Image files are
    stored unchanged, in the order of their paths. Images without a caption or with undecodable content are skipped and
    counted. The shards appear in `out` together, when all are complete.

    Args:
        images: folder that is searched recursively.
        out: folder of the shards; created if absent.
        samples_per_shard: samples in every shard but the last.
        name: prefix of the file names of the shards.

    Raises:
        UserError: no such folder, no usable image in it, `out` has shards of this name, or it cannot be written.
    """
    if not images.is_dir():
        raise UserError(f"{images}: no such folder. Expected a folder of images, each with a caption in stem.txt.")
    paths = sorted(path for path in images.rglob("*") if _is_image(path, images))
    if not paths:
        raise UserError(f"{images}: no image in it. Expected files ending in {', '.join(sorted(IMAGE_EXTENSIONS))}.")
    with locked(inside(out), str(out)):
        return _pack(images, paths, out, samples_per_shard, name)


def _pack(images: Path, paths: list[Path], out: Path, samples_per_shard: int, name: str) -> Report:
    if old := sorted(out.glob(f"{name}-*.tar")):
        raise UserError(f"{old[0]} exists already. Choose another folder or name, or remove the {len(old)} old shards.")
    skipped: dict[str, list[str]] = {}

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for number, path in enumerate(paths):
            try:
                picture = _load(path)
                measure(picture.image, verify=True)
            except SampleError as error:
                skipped.setdefault(error.reason, []).append(str(path.relative_to(images)))
                continue
            files = {picture.extension: picture.image, "txt": picture.caption.encode()}
            yield f"{number:06d}-{_plain(path.stem)}", files

    try:
        with staging(out) as stage:
            shards = write_shards(stage, name, samples(), samples_per_shard)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}). Make room or choose another folder; nothing is left"
            " of this attempt."
        ) from error
    report = Report(
        images=len(paths),
        samples=len(paths) - sum(map(len, skipped.values())),
        shards=tuple(out / shard.name for shard in shards),
        skipped=skipped,
    )
    if not report.samples:
        raise UserError(f"{images}: no image can be used. {report}")
    return report


def _is_image(path: Path, root: Path) -> bool:
    """Return whether a file is an image to pack or, if unusable, to count."""
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    extension = path.suffix[1:].lower()
    if extension in IMAGE_EXTENSIONS or extension == "txt" or not path.is_file():
        return extension in IMAGE_EXTENSIONS
    try:
        with path.open("rb") as file:
            return looks_like_image(file.read(16))
    except OSError:
        return False


def _load(path: Path) -> Picture:
    try:
        image = read_file(path, MAX_IMAGE_BYTES)
        caption = read_file(_caption_of(path), MAX_TEXT_BYTES)
    except FileNotFoundError as error:
        raise SampleError("no caption") from error
    except OSError as error:
        raise SampleError("cannot be read", str(error)) from error
    extension = path.suffix[1:].lower()
    return Picture(image, extension if extension in IMAGE_EXTENSIONS else "jpg", caption_text(caption))


def _caption_of(path: Path) -> Path:
    """Path of the caption file of an image; the extension may be in capitals, as cameras write names."""
    names = (path.with_suffix(extension) for extension in (".txt", ".TXT", ".Txt"))
    return next((name for name in names if name.is_file()), path.with_suffix(".txt"))


def _plain(stem: str) -> str:
    """Make a file stem part of a key: no dots, which would end the key; short ASCII, which fits a plain tar header."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60]
