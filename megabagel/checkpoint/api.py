"""Checkpoints of a run: find the one to resume from, check it against the config, and load its tensors.

RUN/checkpoints/step_00000100/   one checkpoint; its files are listed in manifest.py
RUN/checkpoints/latest           name of the newest complete checkpoint

Writing is in saver.py. docs/checkpoints.md describes the format and its guarantees.
"""

import json
import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megabagel.checkpoint.checksums import ANOTHER
from megabagel.checkpoint.manifest import KEYS, MANIFEST, STATE, Manifest, identity, leaves, read_json, read_manifest
from megabagel.checkpoint.megatron_strategy import LoadBoxes, NothingCommon
from megabagel.checkpoint.reader import Stored, verify
from megabagel.checkpoint.saver import LATEST, Saver, save, take_back
from megabagel.config.schema import Config, ModelConfig
from megabagel.errors import UserError
from megabagel.log import RANK0
from megabagel.model.freezing import is_frozen
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import on_all_ranks
from megabagel.runtime.objects import broadcast

__all__ = ["Manifest", "Saver", "find", "load", "read", "save", "weights_of"]

logger = logging.getLogger(__name__)


def find(config: Config, mesh: Mesh) -> Path | None:
    """Return the checkpoint to resume from by `run.resume`, or None for a new run. Collective.

    `auto` takes the newest complete and undamaged one. All checksums are compared, shared among the ranks; a damaged
    checkpoint is named in a warning and the one before it is tried.

    Raises:
        UserError: on every rank, if a checkpoint named by the user is damaged, or if `auto` finds only damaged ones.
    """
    if config.run.resume == "none":
        return None
    if config.run.resume != "auto":
        folder = Path(config.run.resume)
        try:
            _check(folder, mesh)
        except UserError as error:
            raise UserError(f"run.resume={folder}: {error} Mend it, or use run.resume=auto or none.") from error
        return folder
    root = Path(config.run.dir) / "checkpoints"
    if mesh.world.first:
        take_back(root)
    # Rank 0's list for all: on a shared file system other hosts may see a new folder later.
    candidates = broadcast([str(folder) for folder in _candidates(root)])
    damage = None
    for folder in map(Path, candidates):
        try:
            _check(folder, mesh)
            return folder
        except UserError as error:
            damage = damage or error
            logger.warning("not resuming from %s: %s", folder, error, extra=RANK0)
    if damage is not None:
        raise UserError(
            f"run.resume=auto: none of {len(candidates)} checkpoints in {config.run.dir}/checkpoints is whole. The "
            f"newest: {damage} To start anew, set run.resume=none."
        )
    return None


def _candidates(root: Path) -> list[Path]:
    """Return checkpoints in the order in which to try them: the one `latest` names, then earlier ones; without it, all.

    `latest` may name a lower step than another run left behind. A later step that was written when `latest` named the
    same checkpoint as now is this run's, which was ended before it could write `latest` again: it comes first. What
    `latest` named then is in its manifest; times of files are of no use, since those of a copy may be in any order.
    """
    folders = sorted((path for path in root.glob("step_*") if path.is_dir()), reverse=True)
    with suppress(OSError, ValueError):
        named, written = root / (root / LATEST).read_text().strip(), (root / LATEST).stat().st_mtime_ns
        if named in folders:
            place = folders.index(named)
            return [folder for folder in folders[:place] if _follows(folder, named, written)] + folders[place:]
    return folders


def _follows(folder: Path, named: Path, written: int) -> bool:
    """Whether a checkpoint was written when `latest` named `named`; by its time where its manifest has no `after`."""
    try:
        after = read_manifest(folder).after
        return after == identity(named) if after is not None else (folder / MANIFEST).stat().st_mtime_ns > written
    except (OSError, UserError):
        return False


def _check(folder: Path, mesh: Mesh) -> None:
    """Compare every checksum of a checkpoint, shared among the ranks. Raises UserError on every rank."""
    on_all_ranks(lambda: verify(folder, mesh.world.rank, mesh.world.size))


def read(folder: Path, config: Config) -> tuple[int, dict[str, Any]]:
    """Return (finished steps, JSON state) of a checkpoint, after checking it against the config of the run.

    Raises:
        UserError: the checkpoint is incomplete, or differs in model, seed, EMA or freeze list.
    """
    manifest = read_manifest(folder)
    named = folder.name.removeprefix("step_")
    if folder.name.startswith("step_") and named.isdecimal() and int(named) != manifest.step:
        raise UserError(f"{folder / MANIFEST}: step is {manifest.step}, the folder is called {folder.name}. {ANOTHER}")
    state = read_json(folder, STATE, manifest)
    if manifest.seed is None:
        raise UserError(
            f"run.resume: {folder} holds no run to go on with (weights that were imported, or left by reshard without "
            f"the optimizer): start one with run.init_from={folder}"
        )
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
    if (manifest.seed, manifest.keys) != (config.train.seed, KEYS):
        raise UserError(
            f"train.seed={config.train.seed} (draws of version {KEYS}), but {folder} was trained with seed "
            f"{manifest.seed} (version {manifest.keys}), so order, noise and dropout would not go on as they began. "
            f"Use the same seed and version, or start a run.dir of its own with run.init_from={folder}."
        )
    return manifest.step, state


def weights_of(folder: Path, config: Config, tensors: dict[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """Select which of this rank's tensors to `load` for a new run that starts from a checkpoint's weights.

    With `run.init_weights=ema` these are the averaged weights; frozen weights have no average, so their plain values
    are taken.

    Raises:
        UserError: the checkpoint is incomplete, or its model has other shapes.
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
        # QK-norm may be added to a model trained without it; its weights keep their initial ones.
        new = not manifest.model["qk_norm"] and ("q_norm" in name or "k_norm" in name)
        if kind == "weight" and not new:
            has_average = averaged and not is_frozen(name, config.model, manifest.freeze)
            wanted[label] = replace(tensor, key=f"ema/{name}") if has_average else tensor
    return wanted


_FREE_TO_CHANGE = {"qk_norm", "rope_precision", "interpolate_pos", "init_std", "vit.norm_eps", "norm_eps", "rope_base"}
"""Model fields that a new run may change: those that change no shape, and QK-norm, which the paper adds after
alignment (BAGEL section 4)."""


def _differences(
    model: ModelConfig, manifest: Manifest, but: Collection[str] = ()
) -> Iterator[tuple[str, object, object]]:
    """Yield (dotted key, value here, value in the manifest) of model fields that differ, `vae.path` aside."""
    mine = leaves(json.loads(json.dumps(asdict(model))))
    theirs = json.loads(json.dumps(manifest.model))
    for key in sorted((mine.keys() | theirs.keys()) - {"vae.path", *but}):
        if mine.get(key) != theirs.get(key):
            yield key, mine.get(key), theirs.get(key)


def load(folder: Path, tensors: dict[str, ShardedTensor]) -> None:
    """Fill this rank's tensors in place from a checkpoint of any grid. Not collective.

    Raises:
        UserError: the bytes read are damaged, or a tensor is missing or has another shape.
    """
    stored = Stored(folder)
    try:
        # Without the access check, which gathers metadata of all ranks: `load` asks no other rank.
        dist_checkpointing.load(
            dict(tensors), str(folder), LoadBoxes(stored), NothingCommon(), validate_access_integrity=False
        )
    finally:
        stored.close()
