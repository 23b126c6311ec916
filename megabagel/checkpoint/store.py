"""Checkpoint folders: written aside, completed by a manifest, renamed, then named by `latest`.

    RUN/checkpoints/step_00000100/state.json      data plan and other JSON state; written first
    RUN/checkpoints/step_00000100/manifest.json   step, grid, model, versions, size of every file; written last
    RUN/checkpoints/latest                        name of the newest complete checkpoint

A crash at any moment leaves a folder without manifest under a temporary name, and `latest` as it was. A disk that
refuses leaves not even that folder.
"""

import json
import logging
import os
import pickle
import queue
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megabagel.config.schema import Config, ModelConfig
from megabagel.errors import UserError
from megabagel.model.freezing import is_frozen
from megabagel.parallel import host
from megabagel.parallel.agree import once
from megabagel.parallel.topology import Topology

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"
_ELSE = "Name another checkpoint with run.resume, or remove this one: run.resume=auto then takes the one before it."
_BOX_OVERHEAD = 4096
"""Bytes that a box takes on disk beside its numbers, at most: headers, and its entry in the list of all boxes."""

logging.getLogger(filesystem_async.__name__).setLevel(logging.CRITICAL)  # its errors are raised as well


def save(
    config: Config, topology: Topology, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]
) -> Path:
    """Write a checkpoint of `step` finished steps; returns its folder. Called on every rank.

    Raises UserError on every rank when the disk refuses; what was there before stays.
    """
    root = Path(config.run.dir) / "checkpoints"
    final = root / f"step_{step:08d}"
    partial = root / f".{final.name}.partial"
    size = _disk_size(tensors)

    def prepare() -> None:
        with _writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / STATE).write_text(json.dumps(state))
            free = shutil.disk_usage(partial).free
            if free < size:
                raise OSError(f"it takes up to {size >> 10:,} KiB, {free >> 10:,} KiB are free")

    def complete() -> None:
        with _writing(partial):
            train = config.train
            write_manifest(
                partial, config.model, step=step, grid=topology.describe(), ema=train.ema, freeze=train.freeze
            )
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _replace(root / LATEST, final.name)
            _forget_old(final, config.checkpoint.keep)

    once(topology, prepare)
    # Saving is synchronous here, so results need no manager process, which would outlive a killed rank.
    filesystem_async._results_queue = queue.SimpleQueue()
    with _writing(partial):
        dist_checkpointing.save(dict(tensors), str(partial))
    dist.barrier()
    once(topology, complete)
    logger.info("checkpoint %s", final)
    return final


def find(config: Config) -> Path | None:
    """The checkpoint to resume from by `run.resume`, or None for a fresh start.

    Raises UserError when a named checkpoint is not complete.
    """
    if config.run.resume == "none":
        return None
    if config.run.resume != "auto":
        folder = Path(config.run.resume)
        if not (folder / MANIFEST).is_file():
            raise UserError(
                f"run.resume={folder}: no complete checkpoint there (expected {MANIFEST} in it). Name a folder such as "
                "RUN/checkpoints/step_00000100, or use run.resume=auto or none."
            )
        return folder
    root = Path(config.run.dir) / "checkpoints"
    complete = sorted(path.parent for path in root.glob(f"step_*/{MANIFEST}"))
    with suppress(OSError):  # `latest` may name a lower step than another run left behind
        named = root / (root / LATEST).read_text().strip()
        return named if named in complete else complete[-1] if complete else None
    return complete[-1] if complete else None


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    """Finished steps; 0 where weights were imported."""
    ema: float
    """`train.ema` of the run; 0: it holds no averaged weights."""
    freeze: tuple[str, ...]
    """`train.freeze` of the run; frozen weights have neither moments nor averages."""
    model: dict[str, Any]
    """The model's config by dotted key."""


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and check that all of its files are there, as long as they were written.

    Raises UserError.
    """
    manifest = _read_json(folder / MANIFEST)
    try:
        written, files = manifest["format"], dict(manifest["files"])
        model = _leaves(asdict(ModelConfig())) | _leaves(manifest["model"])  # fields that are younger than the file
        found = Manifest(int(manifest["step"]), manifest["ema"], tuple(manifest.get("freeze", ())), model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: no manifest of a checkpoint ({error!r}). {_ELSE}") from error
    if written != FORMAT:
        raise UserError(f"{folder}: checkpoint format {written}, this version reads {FORMAT}. {_ELSE}")
    for name, size in files.items():
        path = folder / name
        there = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        if there != f"{size} bytes":
            raise UserError(f"{path}: {there}, expected {size} bytes by {MANIFEST}. {_ELSE}")
    return found


def read(folder: Path, config: Config) -> tuple[int, dict[str, Any]]:
    """(finished steps, JSON state) of a checkpoint, after checking that it is whole and of the same run."""
    manifest, state = read_manifest(folder), _read_json(folder / STATE)
    for key, mine, theirs in _differences(config.model, manifest):
        raise UserError(
            f"model.{key}={mine!r}, but {folder} was trained with {theirs!r}: use the model it was trained with, or "
            "another run.dir, or run.resume=none"
        )
    if config.train.ema and not manifest.ema:
        raise UserError(
            f"train.ema={config.train.ema}, but {folder} was written with train.ema=0 and holds no averaged weights: "
            "set train.ema=0, or start anew with another run.dir or run.resume=none"
        )
    if sorted(config.train.freeze) != sorted(manifest.freeze):
        raise UserError(
            f"train.freeze={list(config.train.freeze)}, but {folder} was written with {list(manifest.freeze)}, so "
            "other weights have moments. Go on with the same set, or start the next stage in a run.dir of its own with "
            f"run.init_from={folder}."
        )
    return manifest.step, state


def weights_of(folder: Path, config: Config, tensors: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Which of this rank's tensors to `load` for a new run that starts from the weights of a checkpoint.

    The averaged weights with `run.init_weights` ema; weights that did not learn have no average but themselves.
    Raises UserError when the checkpoint is not whole, or its model has other shapes.
    """
    manifest = read_manifest(folder)
    for key, mine, theirs in _differences(config.model, manifest, but=_FREE_TO_CHANGE):
        raise UserError(
            f"run.init_from={folder}: its model.{key} is {theirs!r}, this run's {mine!r}. Set model.{key}={theirs}, "
            "or name a checkpoint of this model."
        )
    averaged = config.run.init_weights == "ema"
    if averaged and not manifest.ema:
        raise UserError(
            f"run.init_weights=ema, but {folder} holds no averaged weights (it was written with train.ema=0): set "
            "run.init_weights=trained, or name another checkpoint"
        )
    wanted = {}
    for label, tensor in tensors.items():
        kind, _, name = tensor.key.partition("/")
        new = not manifest.model["qk_norm"] and ("q_norm" in name or "k_norm" in name)  # keeps its initial ones
        if kind == "weight" and not new:
            has_average = averaged and not is_frozen(name, config.model, manifest.freeze)
            wanted[label] = replace(tensor, key=f"ema/{name}") if has_average else tensor
    return wanted


_FREE_TO_CHANGE = {"qk_norm", "rope_precision", "interpolate_pos", "init_std", "vit.norm_eps", "norm_eps", "rope_base"}
"""Fields of the model that a new run may change: those without a shape, and QK-norm, which the paper adds after
alignment (BAGEL section 4)."""


def _differences(
    model: ModelConfig, manifest: Manifest, but: Collection[str] = ()
) -> Iterator[tuple[str, object, object]]:
    """(dotted key, value here, value there) of fields that differ. Where the codec's weights lie may always change."""
    mine = _leaves(json.loads(json.dumps(asdict(model))))
    theirs = json.loads(json.dumps(manifest.model))
    for key in sorted((mine.keys() | theirs.keys()) - {"vae.path", *but}):
        if mine.get(key) != theirs.get(key):
            yield key, mine.get(key), theirs.get(key)


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The values of a nested mapping by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). {_ELSE}") from error


def load(folder: Path, tensors: dict[str, ShardedTensor]) -> None:
    """Fill this rank's tensors in place. The checkpoint may come from any grid.

    Raises UserError when its content is damaged.
    """
    targets = {label: tensor.data for label, tensor in tensors.items()}
    try:
        loaded = dist_checkpointing.load(dict(tensors), str(folder), strict="raise_unexpected")
    except (OSError, ValueError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise UserError(f"{folder}: cannot be loaded ({_reason(error)}). {_ELSE}") from error
    for label, target in targets.items():
        if loaded[label].data_ptr() != target.data_ptr():
            target.copy_(loaded[label].view_as(target))


def _disk_size(tensors: dict[str, ShardedTensor]) -> int:
    """Bytes that a checkpoint with these tensors of every rank takes on disk, and a little more."""
    mine = [tensor.data.nbytes + _BOX_OVERHEAD for tensor in tensors.values() if is_main_replica(tensor.replica_id)]
    total = torch.tensor(sum(mine), device=host.device())
    dist.all_reduce(total)
    return int(total)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into a user's error that names the folder, and gives back the room taken so far.

    megatron-core's writers tell every rank of theirs as CheckpointException, which is no Exception.
    """
    try:
        yield
    except (OSError, CheckpointException) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"{folder}: checkpoint cannot be written ({_reason(error)}). The previous checkpoint is untouched; make "
            "room or mend permissions, or set run.dir elsewhere, and start again."
        ) from error


def _reason(error: BaseException) -> str:
    """What went wrong; of the failures of several ranks, which rank 0 knows, rather one that the system explains."""
    if not isinstance(error, CheckpointException):
        return str(error)
    failures = sorted(error.failures.items(), key=lambda failure: "Errno" not in str(failure[1][0]))
    return next((f"rank {rank}: {cause}" for rank, (cause, _) in failures), "see the message of rank 0")


def write_manifest(folder: Path, model: ModelConfig, **about: Any) -> None:
    """Complete a checkpoint folder: flush its files and list them; `about` are step, grid, ema and the like."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    manifest = {
        "format": FORMAT,
        **about,
        "model": asdict(model),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "numpy")},
        "files": files,
    }
    _replace(folder / MANIFEST, json.dumps(manifest, indent=1))


def _replace(path: Path, text: str) -> None:
    """Write a small file so that it is either the old or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _forget_old(newest: Path, keep: int) -> None:
    """Remove all but `keep` checkpoints up to the newest. Those of later steps are another run's, and are left."""
    complete = sorted(newest.parent.glob(f"step_*/{MANIFEST}"))
    for manifest in [path for path in complete if path.parent <= newest][:-keep] if keep else []:
        manifest.unlink()  # incomplete from here on, whatever happens next
        shutil.rmtree(manifest.parent, ignore_errors=True)
