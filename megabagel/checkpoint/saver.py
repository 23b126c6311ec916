"""Asynchronous saving: copy to host memory, write in a thread, complete the checkpoint between two steps.

A checkpoint folder is complete or absent. It is written under a temporary name; the manifest comes last, then the
folder is renamed, then `latest` names it, each flushed to the disk before the next. A crash at any byte leaves the
previous state.

The writer is a thread rather than a process: writing and checksums release Python's lock, and a thread cannot outlive
its rank or be killed without it. Costs: docs/checkpoints.md#what-it-costs.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megabagel.checkpoint.manifest import CONFIG, MANIFEST, STATE, flush, identity, replace_file, write_manifest
from megabagel.checkpoint.megatron_strategy import HostCopies, SaveSlices, bytes_of
from megabagel.config.load import dump
from megabagel.config.schema import Config
from megabagel.errors import UserError, no_space
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import all_max, on_all_ranks, on_rank0

logger = logging.getLogger(__name__)

LATEST, _REPLACED = "latest", ".replaced"
_BOX_OVERHEAD = 1024
"""Upper bound of the bytes that a slice takes on disk besides its elements: its entries in file header and index."""
_ROOM = 1 << 16
"""Approximate bytes of all other files."""


class Writer:
    """A rank's file while it is written by a thread."""

    def __init__(self, step: int, request: AsyncRequest, strategy: SaveSlices, beside: bool) -> None:
        """Start writing.

        Args:
            step: of the checkpoint.
            request: megatron-core's request; its function writes this rank's file.
            strategy: has the checksums of all files once the request is finalized.
            beside: True to return at once; False to wait for the file.
        """
        self.step, self.request, self.strategy = step, request, strategy
        self.began = time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()
        if not beside:
            self._thread.join()

    def _run(self) -> None:
        try:
            self.request.async_fn(*self.request.async_fn_args)
        # Kept for `result`, which raises it in the main thread.
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        """Whether this rank's file is written, or has failed."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for the thread. Raises OSError if the file could not be written."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Saver:
    """Saver of a run's checkpoints. All methods are collective: every rank calls them at the same point of the run.

    At most one checkpoint is being written at a time, so at most one copy of a rank's state is in host memory. A write
    error becomes a UserError on every rank, at the next step's `poll` at the latest; earlier checkpoints stay.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.root = Path(config.run.dir) / "checkpoints"
        self._copies = HostCopies() if config.checkpoint.async_save else None
        self._writer: Writer | None = None
        self._removal: threading.Thread | None = None

    @property
    def writing(self) -> int | None:
        """Step whose checkpoint is being written, or None."""
        return self._writer.step if self._writer is not None else None

    def save(self, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]) -> None:
        """Write a checkpoint; with `checkpoint.async_save`, return as soon as the state is copied.

        Args:
            step: finished steps.
            tensors: this rank's shards.
            state: JSON state of the run, equal on all ranks; rank 0 writes it.
        """
        if self._writer is not None:
            logger.info("checkpoint of step %d waits for the one of step %d", step, self._writer.step)
        self.wait()
        size, boxes = bytes_of(tensors)
        partial = self._partial(step)
        with self._giving_back(partial):
            on_rank0(lambda: self._prepare(partial, state, size + boxes * _BOX_OVERHEAD + _ROOM))
        strategy, beside = SaveSlices(self._copies), self._copies is not None
        request = strategy.async_save(tensors, partial)
        if self._copies is not None:
            logger.info("checkpoint of step %d: %s MiB copied to host memory per rank, written beside the next steps",
                        step, f"{len(self._copies.buffer) >> 20:,}")  # fmt: skip
        self._writer = Writer(step, request, strategy, beside)
        if not beside:
            self.wait()

    def poll(self) -> None:
        """Complete a checkpoint that every rank has written. Costs one small all-reduce while one is being written."""
        if self._writer is None:
            return
        (waiting,) = all_max(int(not self._writer.done))
        if not waiting:
            self._end()

    def wait(self) -> None:
        """Complete the checkpoint that is being written, if any, and wait until old ones are removed."""
        self._end()
        if self._removal is not None:
            self._removal.join()

    close = wait

    def _end(self) -> None:
        """Complete the checkpoint that is being written, if any."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        partial = self._partial(writer.step)
        with self._giving_back(partial):
            # Each in on_all_ranks: a rank with a write error must not leave the others in the gather of `finalize_fns`.
            for work in (writer.result, *writer.request.finalize_fns):
                on_all_ranks(_named(partial, work))
            on_rank0(lambda: self._complete(partial, writer))
        logger.info("checkpoint %s (%.1f s)", self.folder(writer.step), time.monotonic() - writer.began)

    def folder(self, step: int) -> Path:
        """Folder of the checkpoint of `step` finished steps."""
        return self.root / f"step_{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.root / f".step_{step:08d}.partial"

    def _prepare(self, partial: Path, state: dict[str, Any], size: int) -> None:
        """On rank 0: remove partial folders of killed runs, write state and config, and check the free space."""
        with _writing(partial):
            take_back(self.root)
            for left in self.root.glob(".step_*"):  # by runs that were killed
                shutil.rmtree(left)
            partial.mkdir(parents=True)
            replace_file(partial / STATE, json.dumps(state, allow_nan=False))
            dump(self.config, partial / CONFIG)
            free = shutil.disk_usage(partial).free
            if free < size:
                raise no_space(f"it takes up to {size >> 10:,} KiB, {free >> 10:,} KiB are free")

    def _complete(self, partial: Path, writer: Writer) -> None:
        """On rank 0: write the manifest, rename the folder, update `latest`, then remove old checkpoints."""
        train, final = self.config.train, self.folder(writer.step)
        with _writing(partial):
            axes = {name: getattr(self.mesh, name).size for name in ("tp", "pp", "cp", "dp")}
            grid = axes | {"vpp": self.config.parallel.vpp}
            about = {"step": writer.step, "grid": grid, "ema": train.ema, "freeze": train.freeze, "after": ""}
            with suppress(OSError, ValueError):
                about["after"] = identity(self.root / (self.root / LATEST).read_text().strip())
            write_manifest(partial, self.config.model, writer.strategy.sums, **about, seed=train.seed)
            replaced = final.with_name(f".{final.name}{_REPLACED}")
            # A folder of this name is from a longer run before this one. Two renames rather than a removal first:
            # after a crash between them, `take_back` restores it.
            if final.exists():
                final.rename(replaced)
            partial.rename(final)
            flush(self.root)
            replace_file(self.root / LATEST, final.name)
            gone = [replaced, *self._forget_old(final)]
        # In a thread of its own: training need not wait until the files are removed.
        self._removal = threading.Thread(target=_remove, args=(gone,), name="removal of old checkpoints")
        self._removal.start()

    @contextmanager
    def _giving_back(self, partial: Path) -> Iterator[None]:
        """Remove the partial folder on a UserError, which every rank raises alike: no rank writes to it any more."""
        try:
            yield
        except UserError:
            if self.mesh.world.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _forget_old(self, newest: Path) -> Iterator[Path]:
        """Rename the checkpoints to remove, and yield their new paths.

        Kept are the newest `checkpoint.keep`, and steps that `checkpoint.keep_every` divides. Later steps than `newest`
        belong to another run and are left alone.
        """
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        complete = sorted(path.parent for path in self.root.glob(f"step_*/{MANIFEST}"))
        for folder in [path for path in complete if path <= newest][:-keep] if keep else []:
            step = folder.name.removeprefix("step_")
            if not (every and step.isdecimal() and int(step) % every == 0):
                gone = folder.with_name(f".{folder.name}.old")
                # Renamed before it is removed: a half-removed folder must not look like a checkpoint.
                folder.rename(gone)
                yield gone


def save(config: Config, mesh: Mesh, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint synchronously and return its folder. Collective.

    Args:
        config: of the run; `run.dir` is where the checkpoint goes.
        mesh: process groups of the job.
        step: finished steps.
        tensors: this rank's shards.
        state: JSON state of the run.

    Raises:
        UserError: on every rank, if any file cannot be written.
    """
    saver = Saver(replace(config, checkpoint=replace(config.checkpoint, async_save=False)), mesh)
    saver.save(step, tensors, state)
    return saver.folder(step)


def take_back(root: Path) -> None:
    """Restore the name of an old checkpoint if a crash came between the two renames that replace it."""
    for replaced in root.glob(f".step_*{_REPLACED}"):
        final = root / replaced.name.removeprefix(".").removesuffix(_REPLACED)
        if not final.exists():
            replaced.rename(final)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _named(folder: Path, work: Callable[[], object]) -> Callable[[], None]:
    """Wrap `work` so that its OSError becomes a UserError that names the folder."""

    def named() -> None:
        with _writing(folder):
            work()

    return named


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: checkpoint cannot be written ({error}). The previous checkpoint is untouched; make room or "
            "mend permissions, or set run.dir elsewhere, and start again."
        ) from error
