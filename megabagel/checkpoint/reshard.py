"""Resharding: rewrite a checkpoint as another grid would have written it, without ranks and in little memory.

Any grid loads any checkpoint; this tunes storage to a grid (each rank then reads its own file from front to back), and
leaves out states that are no longer needed.
"""

import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from megabagel.checkpoint.checksums import ANOTHER, check_files
from megabagel.checkpoint.hf.folder import new_folder
from megabagel.checkpoint.hf.names import model_shapes
from megabagel.checkpoint.lazy import Part, file_of, write_file, write_index
from megabagel.checkpoint.manifest import INDEX, MANIFEST, METADATA, Manifest, model_of, write_manifest
from megabagel.checkpoint.reader import Stored
from megabagel.checkpoint.tensors import MOMENTS, Shard, boxes_of
from megabagel.config.checks import RULES
from megabagel.config.schema import Config, ModelConfig, ParallelConfig
from megabagel.errors import UserError
from megabagel.model.bagel import Bagel
from megabagel.model.freezing import is_frozen
from megabagel.model.shapes_only import build_shapes
from megabagel.model.sharding import pieces
from megabagel.parallel.stages import layer_split

KINDS = {"optimizer": MOMENTS, "ema": ("ema",)}
"""Kinds of tensors that `drop` leaves out, by its words."""


@dataclass(frozen=True)
class Grid:
    """Sizes of the parallel axes."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp


def reshard(source: Path, out: Path, changes: Mapping[str, int], drop: Collection[str] = ()) -> Grid:
    """Write checkpoint `source` as folder `out` for another grid; returns that grid.

    Args:
        source: checkpoint folder.
        out: new folder.
        changes: axis -> size; other axes keep the size of the source's grid.
        drop: `optimizer`, `ema` or both. Without optimizer states a run can start from it (run.init_from) but not
            resume.

    Raises:
        UserError: the source is damaged, or its model does not fit the grid.
    """
    stored = Stored(source)
    model = model_of(source, stored.manifest)
    grid = replace(Grid(**stored.manifest.grid), **changes)
    _check(model, grid)
    _check_keys(stored, model)
    dropped = {kind for what in drop for kind in KINDS[what]}
    size = sum(entry.nbytes(box) for entry in stored.index.values() for box in entry.boxes)
    with new_folder(out, size + (1 << 20)) as folder:
        _copy_files(stored, folder)
        found = [
            (file_of(rank), *write_file(folder / file_of(rank), parts))
            for rank in range(grid.size)
            if (parts := list(_parts(stored, model, grid, rank, dropped)))
        ]
        write_index(folder, [index for _, index, _ in found])
        sums = {name: sums for name, _, sums in found}
        write_manifest(folder, model, sums, **_about(stored.manifest, drop), grid=asdict(grid))
    stored.close()
    return grid


def _check(model: ModelConfig, grid: Grid) -> None:
    """Raise UserError if the model cannot be split over this grid."""
    config = Config(model=model, parallel=ParallelConfig(tp=grid.tp, pp=grid.pp, vpp=grid.vpp, cp=grid.cp))
    rules = [rule for rule in RULES if all(key.startswith(("model.", "parallel.")) for key in rule.keys)]
    lines = [line for rule in rules for line in rule.messages(config)]
    if lines:
        raise UserError("\n  ".join(("the checkpoint's model does not fit this grid", *lines)))


def _check_keys(stored: Stored, model: ModelConfig) -> None:
    """Raise UserError unless the checkpoint holds every weight of its model and nothing else."""
    manifest, shapes = stored.manifest, model_shapes(model)
    resumable = manifest.seed is not None
    for name, shape in shapes.items():
        learns = not is_frozen(name, model, manifest.freeze)
        kinds = ["weight", *(MOMENTS if resumable and learns else ()), *(["ema"] if manifest.ema and learns else ())]
        for key in (f"{kind}/{name}" for kind in kinds):
            if key not in stored or stored.shape(key) != shape:
                found = f"is {list(stored.shape(key))}" if key in stored else "is missing"
                raise UserError(f"{stored.folder}: tensor {key} {found}, expected {list(shape)}. {ANOTHER}")
    for key in stored.index:
        if key.partition("/")[2] not in shapes:
            raise UserError(f"{stored.folder}: tensor {key} is none of the model. {ANOTHER}")


def _about(manifest: Manifest, drop: Collection[str]) -> dict[str, object]:
    """Return the manifest fields to carry over. Without optimizer states there is no run to resume: seed is None."""
    resumable = "optimizer" not in drop
    return {
        "step": manifest.step,
        "ema": 0.0 if "ema" in drop else manifest.ema,
        "freeze": manifest.freeze,
        "seed": manifest.seed if resumable else None,
    }


def _copy_files(stored: Stored, folder: Path) -> None:
    """Copy state, config and files that an import kept."""
    stored.state()
    written = {box.file for entry in stored.index.values() for box in entry.boxes} | {INDEX, METADATA, MANIFEST}
    files = {name: sums for name, sums in stored.manifest.files.items() if name not in written}
    check_files({stored.folder / name: sums for name, sums in files.items()})
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(stored.folder / name, folder / name)


def _parts(stored: Stored, model: ModelConfig, grid: Grid, rank: int, dropped: Collection[str]) -> Iterator[Part]:
    """Yield the slices of one rank: its share of the flat parameters, split as the distributed optimizer does."""
    tp, copy, pp = rank % grid.tp, rank // grid.tp % (grid.cp * grid.dp), rank // (grid.tp * grid.cp * grid.dp)
    named = [named for stage in stages(model, grid, tp, pp) for named in stage.named_parameters()]
    whole = sum(parameter.numel() for _, parameter in named)
    first, last = (whole * part // (grid.cp * grid.dp) for part in (copy, copy + 1))
    at = 0
    for name, parameter in named:
        start, stop = max(first - at, 0), min(last - at, parameter.numel())
        at += parameter.numel()
        if start >= stop:
            continue
        for piece in pieces(name, parameter):
            for kind in ("weight", *MOMENTS, "ema"):
                key = f"{kind}/{piece.name}"
                if key not in stored or kind in dropped or (piece.replicated and tp):
                    continue
                flat = torch.empty(stop - start, dtype=stored.dtype(key), device="meta")
                for box in boxes_of(Shard(parameter, start, stop, {}), piece, kind, flat, tp):
                    shape, offset = tuple(box.local_shape), tuple(box.global_offset)
                    yield Part(key, piece.shape, offset, stored.part(key, offset, shape, stored.dtype(key)))


@lru_cache(maxsize=2**12)
def stages(model: ModelConfig, grid: Grid, tp: int, pp: int) -> list[Bagel]:
    """Return the model chunks of a rank on the meta device: shapes without values.

    Args:
        model: config of the model.
        grid: parallel sizes.
        tp: tensor-parallel rank.
        pp: pipeline rank.
    """
    split = layer_split(Config(model=model, parallel=ParallelConfig(pp=grid.pp, vpp=grid.vpp)))
    mine = [chunk * grid.pp + pp for chunk in range(grid.vpp)]
    return [
        build_shapes(model, split[stage], first=stage == 0, last=stage == len(split) - 1, tp_rank=tp, tp=grid.tp)
        for stage in mine
    ]
