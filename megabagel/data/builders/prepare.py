"""`megabagel data prepare`: packs a folder of plain files into WebDataset shards; kinds are in `prepare_kinds.py`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.data.builders.prepare_kinds import KINDS, Kind, Unit
from megabagel.data.documents import SampleError
from megabagel.data.files import staging
from megabagel.data.formats.samples import IMAGE_EXTENSIONS
from megabagel.data.formats.shards import write_shards
from megabagel.errors import UserError
from megabagel.locks import inside, locked


@dataclass(frozen=True)
class Report:
    """Result of `prepare`: counts, paths of the shards, and by reason the names of what was left out."""

    images: int
    """Candidates for a sample: images, edits or clips."""
    samples: int
    shards: tuple[Path, ...]
    skipped: Mapping[str, Sequence[str]]
    counted: str = "images"
    """Name of the candidates."""

    def text(self, every: bool) -> str:
        """The report as text; with `every` it lists all that were skipped, not only the first of each reason."""
        listed = [f"  {reason}: {name}" for reason, names in sorted(self.skipped.items()) for name in names]
        return "\n".join([str(self), *listed]) if every else str(self)

    def __str__(self) -> str:
        lost = self.images - self.samples
        lines = [f"{self.counted}: {self.images}, samples: {self.samples}, skipped: {lost}, shards: {len(self.shards)}"]
        lines += [f"  {len(names)} x {reason}, first {names[0]}" for reason, names in sorted(self.skipped.items())]
        lines += [f"  {path}" for path in self.shards]
        return "\n".join(lines)


def prepare(images: Path, out: Path, *, samples_per_shard: int, name: str, kind: str = "captions") -> Report:
    """Pack the samples that a folder has in plain files into `out/name-000000.tar`, ...

    A file is an image by its extension or by its first bytes; hidden files and folders are ignored. Image files are
    stored unchanged, in the order of their paths. Images without a text or with undecodable content are skipped and
    counted. The shards appear in `out` together, when all are complete.

    Args:
        images: folder that is searched recursively.
        out: folder of the shards; created if absent.
        samples_per_shard: samples in every shard but the last.
        name: prefix of the file names of the shards.
        kind: a key of `KINDS`.

    Raises:
        UserError: no such folder, nothing usable in it, `out` has shards of this name, or it cannot be written.
    """
    about = KINDS[kind]
    if not images.is_dir():
        raise UserError(f"{images}: no such folder. Expected a folder of images, each with {about.expected}.")
    units = about.find(images)
    if not units:
        raise UserError(f"{images}: no image in it. Expected files ending in {', '.join(sorted(IMAGE_EXTENSIONS))}.")
    with locked(inside(out), str(out)):
        return _pack(images, units, out, samples_per_shard, name, about)


def _pack(images: Path, units: Sequence[Unit], out: Path, samples_per_shard: int, name: str, about: Kind) -> Report:
    if old := sorted(out.glob(f"{name}-*.tar")):
        raise UserError(f"{old[0]} exists already. Choose another folder or name, or remove the {len(old)} old shards.")
    skipped: dict[str, list[str]] = {}

    def samples() -> Iterator[tuple[str, Mapping[str, bytes]]]:
        for number, unit in enumerate(units):
            try:
                yield f"{number:06d}-{_plain(unit.stem)}", unit.load()
            except SampleError as error:
                skipped.setdefault(error.reason, []).append(unit.name)

    try:
        with staging(out) as stage:
            shards = write_shards(stage, name, samples(), samples_per_shard)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}). Make room or choose another folder; nothing is left"
            " of this attempt."
        ) from error
    report = Report(
        images=len(units),
        samples=len(units) - sum(map(len, skipped.values())),
        shards=tuple(out / shard.name for shard in shards),
        skipped=skipped,
        counted=about.counted,
    )
    if not report.samples:
        raise UserError(f"{images}: no image can be used. Expected each with {about.expected}. {report}")
    return report


def _plain(stem: str) -> str:
    """Make a file stem part of a key: no dots, which would end the key; short ASCII, which fits a plain tar header."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:60]
