"""Saving beside training: copied to host memory, written by a thread, completed by all ranks between two steps.

Folders are complete or absent. A checkpoint is written under a temporary name; its manifest comes last, then the
folder gets its name, then `latest` names it, each flushed to the disk before the next. A crash at any byte leaves what
was there before. The writer is a thread and not a process: writing and checksums run outside of Python's lock, and
nothing outlives the rank or can be killed without it.
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

from megabagel.checkpoint.manifest import CONFIG, MANIFEST, STATE, flush, replace_file, write_manifest
from megabagel.checkpoint.megatron_strategy import HostCopies, SaveSlices, bytes_of
from megabagel.config.load import dump
from megabagel.config.schema import Config
from megabagel.errors import UserError, no_space
from megabagel.parallel.mesh import Mesh
from megabagel.runtime.collective_errors import all_max, on_all_ranks, on_rank0

logger = logging.getLogger(__name__)

LATEST, _REPLACED = "latest", ".replaced"
_BOX_OVERHEAD = 1024
"""Bytes that a box takes on disk beside its numbers, at most: in its file's header and in the index."""
_ROOM = 1 << 16
"""Bytes of all other files, about."""


class Writer:
    """A rank's file being written, at once or by a thread."""

    def __init__(self, step: int, request: AsyncRequest, strategy: SaveSlices, beside: bool) -> None:
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
        except BaseException as error:  # for the rank's own thread to raise
            self._error = error

    @property
    def done(self) -> bool:
        """Whether this rank has written its file, or failed to."""
        return not self._thread.is_alive()

    def result(self) -> None:
        """Wait for the end. Raises OSError when the disk refused."""
        self._thread.join()
        if self._error is not None:
            raise self._error


class Saver:
    """Saves the checkpoints of a run. All methods are called on every rank, at the same point of the run.

    At most one checkpoint is being written at a time, so at most one copy of a rank's state is in host memory. What a
    disk refuses is a UserError on every rank, at the latest at the next step's `poll`; the checkpoints before stay.
    """

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.root = Path(config.run.dir) / "checkpoints"
        self._copies = HostCopies() if config.checkpoint.async_save else None
        self._writer: Writer | None = None
        self._removal: threading.Thread | None = None

    @property
    def writing(self) -> int | None:
        """The step whose checkpoint is being written."""
        return self._writer.step if self._writer is not None else None

    def save(self, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]) -> None:
        """Write the checkpoint of `step` finished steps, or begin to.

        With `checkpoint.async_save` it returns when the state is copied, and `poll` completes the checkpoint.
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
        """Complete a checkpoint that every rank has written; costs one small all-reduce, and nothing if none is on."""
        if self._writer is None:
            return
        (waiting,) = all_max(int(not self._writer.done))
        if not waiting:
            self._end()

    def wait(self) -> None:
        """Complete the checkpoint that is being written, if one is, and have old ones removed."""
        self._end()
        if self._removal is not None:
            self._removal.join()

    close = wait

    def _end(self) -> None:
        """Complete the checkpoint that is being written, if one is."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        partial = self._partial(writer.step)
        with self._giving_back(partial):
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
        """On rank 0: the manifest, the name, `latest`; then forget old ones."""
        train, final = self.config.train, self.folder(writer.step)
        with _writing(partial):
            axes = {name: getattr(self.mesh, name).size for name in ("tp", "pp", "cp", "dp")}
            grid = axes | {"vpp": self.config.parallel.vpp}
            about = {"step": writer.step, "grid": grid, "ema": train.ema, "freeze": train.freeze, "after": ""}
            with suppress(OSError, ValueError):
                about["after"] = (self.root / LATEST).read_text().strip()
            write_manifest(partial, self.config.model, writer.strategy.sums, **about, seed=train.seed)
            replaced = final.with_name(f".{final.name}{_REPLACED}")
            if final.exists():  # by a longer run before this one
                final.rename(replaced)
            partial.rename(final)
            flush(self.root)
            replace_file(self.root / LATEST, final.name)
            gone = [replaced, *self._forget_old(final)]
        self._removal = threading.Thread(target=_remove, args=(gone,), name="removal of old checkpoints")
        self._removal.start()

    @contextmanager
    def _giving_back(self, partial: Path) -> Iterator[None]:
        """Where every rank fails alike, nothing is left behind; no rank writes any more."""
        try:
            yield
        except UserError:
            if self.mesh.world.first:
                shutil.rmtree(partial, ignore_errors=True)
            raise

    def _forget_old(self, newest: Path) -> Iterator[Path]:
        """Take their names from all but `keep` checkpoints up to the newest, and those that `keep_every` names; where
        to remove them. Those of later steps are another run's, and are left."""
        keep, every = self.config.checkpoint.keep, self.config.checkpoint.keep_every
        complete = sorted(path.parent for path in self.root.glob(f"step_*/{MANIFEST}"))
        for folder in [path for path in complete if path <= newest][:-keep] if keep else []:
            step = folder.name.removeprefix("step_")
            if not (every and step.isdecimal() and int(step) % every == 0):
                gone = folder.with_name(f".{folder.name}.old")
                folder.rename(gone)  # absent from here on, whatever happens next
                yield gone


def save(config: Config, mesh: Mesh, step: int, tensors: dict[str, ShardedTensor], state: dict[str, Any]) -> Path:
    """Write one checkpoint and return its folder when it is complete. Raises UserError on every rank."""
    saver = Saver(replace(config, checkpoint=replace(config.checkpoint, async_save=False)), mesh)
    saver.save(step, tensors, state)
    return saver.folder(step)


def take_back(root: Path) -> None:
    """Where a crash came between the two renames that replace a checkpoint, the old one gets its name again."""
    for replaced in root.glob(f".step_*{_REPLACED}"):
        final = root / replaced.name.removeprefix(".").removesuffix(_REPLACED)
        if not final.exists():
            replaced.rename(final)


def _remove(folders: list[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _named(folder: Path, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, whose failure names the folder."""

    def named() -> None:
        with _writing(folder):
            work()

    return named


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what a disk refuses into a user's error that names the folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: checkpoint cannot be written ({error}). The previous checkpoint is untouched; make room or "
            "mend permissions, or set run.dir elsewhere, and start again."
        ) from error
