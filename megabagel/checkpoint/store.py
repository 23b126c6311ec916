"""Checkpoint folders: written aside, completed by a manifest, renamed, then named by `latest`.

    RUN/checkpoints/step_00000100/manifest.json   step, grid, model, versions, size of every file; written last
    RUN/checkpoints/step_00000100/state.json      data plan and other JSON state
    RUN/checkpoints/latest                        name of the newest complete checkpoint

A crash at any moment leaves a folder without manifest under a temporary name, and `latest` as it was.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.parallel.agree import once
from megabagel.parallel.topology import Topology

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST, STATE, LATEST = "manifest.json", "state.json", "latest"


def save(
    config: Config, topology: Topology, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]
) -> Path:
    """Write a checkpoint of `step` finished steps; returns its folder. Called on every rank.

    Raises UserError on every rank when the disk refuses; what was there before stays.
    """
    root = Path(config.run.dir) / "checkpoints"
    final = root / f"step_{step:08d}"
    partial = root / f".{final.name}.partial"

    def prepare() -> None:
        with _disk(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def complete() -> None:
        with _disk(partial):
            (partial / STATE).write_text(json.dumps(state))
            _write_manifest(partial, config, topology, step)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _replace(root / LATEST, final.name)
            _forget_old(root, config.checkpoint.keep)

    once(topology, prepare)
    with _disk(partial):
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
    return complete[-1] if complete else None


def read(folder: Path, config: Config) -> tuple[int, dict[str, Any]]:
    """(finished steps, JSON state) of a checkpoint, after checking that it is whole and of the same model."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        state = json.loads((folder / STATE).read_text())
        step, model, files = int(manifest["step"]), manifest["model"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: manifest or state cannot be read ({error}); choose another checkpoint") from error
    if manifest["format"] != FORMAT:
        raise UserError(f"{folder}: checkpoint format {manifest['format']}, this version reads {FORMAT}")
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise UserError(f"{path}: {found} bytes, the manifest says {size}; choose an older checkpoint")
    mine = json.loads(json.dumps(asdict(config.model)))
    for key in sorted(mine.keys() | model.keys()):
        if mine.get(key) != model.get(key):
            raise UserError(
                f"model.{key}={mine.get(key)!r}, but {folder} was trained with {model.get(key)!r}: use the model "
                "it was trained with, or another run.dir, or run.resume=none"
            )
    return step, state


def load(folder: Path, tensors: dict[str, ShardedTensor]) -> None:
    """Fill this rank's tensors in place. The checkpoint may come from any grid."""
    targets = {label: tensor.data for label, tensor in tensors.items()}
    loaded = dist_checkpointing.load(dict(tensors), str(folder), strict="raise_unexpected")
    for label, target in targets.items():
        if loaded[label].data_ptr() != target.data_ptr():
            target.copy_(loaded[label].view_as(target))


class _disk:
    """Turns an operating-system error while writing into a user error that names the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"{self.folder}: checkpoint cannot be written ({error}). The previous checkpoint is untouched; free "
                "space or permissions, or set run.dir elsewhere, and start again."
            ) from error


def _write_manifest(folder: Path, config: Config, topology: Topology, step: int) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(folder))] = path.stat().st_size
    manifest = {
        "format": FORMAT,
        "step": step,
        "grid": topology.describe(),
        "model": asdict(config.model),
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


def _forget_old(root: Path, keep: int) -> None:
    if keep:
        for manifest in sorted(root.glob(f"step_*/{MANIFEST}"))[:-keep]:
            manifest.unlink()  # incomplete from here on, whatever happens next
            shutil.rmtree(manifest.parent, ignore_errors=True)
