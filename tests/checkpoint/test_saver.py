"""Saving beside training: what is saved is what was, failures are told everywhere, and a crash costs nothing older."""

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import yaml
from safetensors import safe_open

from megabagel.config.load import to_dict
from megabagel.config.schema import CheckpointConfig, Config, RunConfig
from megabagel.errors import UserError
from tests.support.grid_run import base_config
from tests.support.rank_pool import RankPool

ROWS = 6


def config_in(folder: Path, **checkpoint: Any) -> Config:
    return replace(base_config(), run=RunConfig(dir=str(folder)), checkpoint=CheckpointConfig(**checkpoint))


def grid_of(config: Config) -> Any:
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    return mesh.build(config)


def tensors_of(grid: Any, value: float) -> dict[str, Any]:
    """This rank's rows of two tensors of different types."""
    from megatron.core.dist_checkpointing import ShardedTensor

    rank, size = grid.world.rank, grid.world.size
    found = {}
    for key, dtype in (("weight/a", torch.bfloat16), ("weight/b", torch.float32)):
        data = torch.arange(ROWS * 7, dtype=torch.float32).view(ROWS, 7).add(value).to(dtype)
        mine = data.chunk(size)[rank].clone()
        offset = (ROWS // size * rank, 0)
        found[key] = ShardedTensor(key, mine, dtype, tuple(mine.shape), (ROWS, 7), offset, None)
    return found


def loaded(folder: Path, grid: Any) -> float:
    """The value that a checkpoint was made with, from every number of it."""
    from megabagel.checkpoint import api

    tensors = tensors_of(grid, torch.nan)
    api.load(folder, tensors)
    values = {
        float(x) for key, t in tensors.items() for x in (t.data.float() - tensors_of(grid, 0)[key].data).flatten()
    }
    assert len(values) == 1
    return values.pop()


def everything(config: Config) -> dict[str, float]:
    """Name and value of every checkpoint there is, and of the one that is found."""
    from megabagel.checkpoint import api

    grid = grid_of(config)
    root = Path(config.run.dir) / "checkpoints"
    found = {folder.name: loaded(folder, grid) for folder in sorted(root.glob("step_*"))}
    newest = api.find(config, grid)
    return found | ({"found": loaded(newest, grid)} if newest else {})


@contextmanager
def gate() -> Iterator[threading.Event]:
    """Writers wait until it is opened."""
    from megabagel.checkpoint import megatron_strategy

    opened, write_file = threading.Event(), megatron_strategy.write_file

    def slowly(*args: Any) -> Any:
        assert opened.wait(60)
        return write_file(*args)

    with mock.patch.object(megatron_strategy, "write_file", slowly):
        yield opened


def train_on(config: Config) -> list[Any]:
    """Save, change the state at once, poll; the folder's names before and after the writer is done; logged lines."""
    from megabagel.checkpoint import api
    from megabagel.checkpoint import saver as module

    grid, lines = grid_of(config), []
    saver, tensors = api.Saver(config, grid), tensors_of(grid, 1)
    root = Path(config.run.dir) / "checkpoints"
    with mock.patch.object(module.logger, "info", lambda text, *args, **_: lines.append(text % args)), gate() as opened:
        saver.save(1, tensors, {"n": 1})
        for tensor in tensors.values():
            tensor.data.fill_(-9)
        saver.poll()
        before = sorted(path.name for path in root.iterdir())
        opened.set()
        while saver.writing:
            saver.poll()
        saver.poll()
        after = sorted(path.name for path in root.iterdir())
        buffer = saver._copies.buffer.data_ptr(), len(saver._copies.buffer)
        opened.clear()
        saver.save(2, tensors_of(grid, 2), {"n": 2})
        threading.Timer(0.2, opened.set).start()
        saver.save(3, tensors_of(grid, 3), {"n": 3})  # waits for the one of step 2
        saver.close()
        assert buffer == (saver._copies.buffer.data_ptr(), len(saver._copies.buffer))
    return [before, after, buffer[1], lines]


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_saved_is_what_was(ranks: RankPool, tmp_path: Path, size: int) -> None:
    config = config_in(tmp_path)
    (before, after, buffer, lines), *_ = ranks.run(size, train_on, config)
    assert before == [".step_00000001.partial"]
    assert after == ["latest", "step_00000001"]
    assert buffer == ROWS // size * 7 * (2 + 4)
    assert "checkpoint of step 3 waits for the one of step 2" in lines
    for found in ranks.run(3 - size, everything, config):
        assert found == {"step_00000001": 1, "step_00000002": 2, "step_00000003": 3, "found": 3}


def test_what_a_checkpoint_says(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_steps, config_in(tmp_path), [4])
    folder = tmp_path / "checkpoints/step_00000004"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(path.name for path in folder.iterdir()) == sorted([*manifest["files"], "manifest.json"])
    assert {"index.json", "state.json", "config.yaml", "rank_00001.safetensors"} <= manifest["files"].keys()
    assert manifest["grid"] == {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 2}
    assert (manifest["step"], manifest["seed"], manifest["keys"]) == (4, base_config().train.seed, 1)
    assert {"torch", "numpy", "megatron-core", "megabagel"} <= manifest["versions"].keys()
    with safe_open(folder / "rank_00001.safetensors", "pt") as file:  # any program can open it
        assert file.get_tensor("weight/b@3,0")[0, 0] == 25
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"] == to_dict(base_config().train)


def save_steps(config: Config, steps: list[int]) -> None:
    from megabagel.checkpoint import api

    grid = grid_of(config)
    saver = api.Saver(config, grid)
    for step in steps:
        saver.save(step, tensors_of(grid, step), {})
    saver.close()


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(2, 0, [5, 6]), (1, 3, [3, 6]), (2, 2, [2, 4, 5, 6]), (0, 0, [1, 2, 3, 4, 5, 6])],
)
def test_keep(ranks: RankPool, tmp_path: Path, keep: int, every: int, left: list[int]) -> None:
    ranks.run(1, save_steps, config_in(tmp_path, keep=keep, keep_every=every), [1, 2, 3, 4, 5, 6])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", *(f"step_{step:08d}" for step in left)]


def fail(config: Config, rank: int) -> tuple[str, int]:
    """A disk that is full for one rank; the message on this one and how many steps later it came."""
    from megabagel.checkpoint import api, megatron_strategy

    grid = grid_of(config)
    saver = api.Saver(config, grid)
    saver.save(1, tensors_of(grid, 1), {})
    saver.wait()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch.object(
        megatron_strategy, "write_file", full if grid.world.rank == rank else megatron_strategy.write_file
    ):
        saver.save(2, tensors_of(grid, 2), {})
        for step in range(1000):
            try:
                saver.poll()
            except UserError as error:
                return str(error), step
    raise AssertionError("silence")


def test_a_writer_that_fails_is_an_error_everywhere(ranks: RankPool, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    (first, step), (second, other) = ranks.run(2, fail, config, 1)
    assert first == second and step == other
    assert first.startswith("rank 1: ") and ".step_00000002.partial: checkpoint cannot be written" in first
    assert "No space left on device" in first and "previous checkpoint is untouched" in first
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert ranks.run(1, everything, config) == [{"step_00000001": 1, "found": 1}]


class Crash(BaseException):
    """The power goes."""


def crash_everywhere(config: Config, first: int) -> list[dict[str, float]]:
    """Save step 2 again and again, ending at the first, second, ... thing done to the disk; what is left each time."""
    from megabagel.checkpoint import api, checksums

    grid = grid_of(config)
    api.save(config, grid, first, tensors_of(grid, 1), {})
    found, ended = [], False
    while not ended:
        with suppress(Crash), _power_for(len(found), checksums.SummedWriter):
            api.save(config, grid, 2, tensors_of(grid, 2), {})
            ended = True
        newest = api.find(config, grid)
        assert newest is not None
        found.append(loaded(newest, grid))
    return found


@contextmanager
def _power_for(count: int, writer: Any) -> Iterator[None]:
    """After `count` writes, flushes, renames and removals the next one does not happen, nor any after it."""
    left = [count]

    def mortal(action: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Crash
            return action(*args, **kwargs)

        return act

    with (
        mock.patch.object(os, "fsync", mortal(os.fsync)),
        mock.patch.object(Path, "rename", mortal(Path.rename)),
        mock.patch.object(Path, "replace", mortal(Path.replace)),
        mock.patch.object(Path, "mkdir", mortal(Path.mkdir)),
        mock.patch.object(writer, "write", mortal(writer.write)),
    ):
        yield


@pytest.mark.parametrize("first", [1, 2])
def test_a_crash_anywhere_leaves_what_was(ranks: RankPool, tmp_path: Path, first: int) -> None:
    """After a checkpoint of step 1; and after one of step 2 itself, by a run that was started over."""
    (found,) = ranks.run(1, crash_everywhere, config_in(tmp_path, keep=1), first)
    assert len(found) > 15 and set(found) == {1, 2}
    assert found == sorted(found), "from the moment on that it has its name, the new one is there"
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002"], "what crashes left behind is removed by the next save"


def fall_back(config: Config) -> tuple[str, list[str], str]:
    """What `auto` takes with damaged newer checkpoints, its warnings, and its error when all are damaged."""
    from megabagel.checkpoint import api

    grid, lines = grid_of(config), []
    root = Path(config.run.dir) / "checkpoints"
    if grid.world.first:
        (root / "step_00000003/rank_00000.safetensors").write_bytes(b"")
        (root / "step_00000002/manifest.json").unlink()
    torch.distributed.barrier()
    with mock.patch.object(api.logger, "warning", lambda text, *args, **_: lines.append(text % args)):
        chosen = api.find(config, grid)
    torch.distributed.barrier()
    (root / "step_00000001/state.json").write_text("[]")
    torch.distributed.barrier()
    try:
        api.find(config, grid)
    except UserError as error:
        return str(chosen), lines, str(error)
    raise AssertionError("a fresh start in silence")


def test_auto_takes_the_newest_that_is_whole_and_says_so(ranks: RankPool, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    ranks.run(2, save_steps, config, [1, 2, 3])
    for chosen, lines, error in ranks.run(2, fall_back, config):
        assert chosen.endswith("step_00000001")
        assert [line.split(": ")[0][-13:] for line in lines] == ["step_00000003", "step_00000002"]
        assert "rank_00000.safetensors: 0 bytes, expected" in lines[0] and "no complete checkpoint" in lines[1]
        assert "none of 3 checkpoints" in error and "rank_00000.safetensors" in error and "run.resume=none" in error


def chosen(config: Config) -> str:
    from megabagel.checkpoint import api

    return str(api.find(config, grid_of(config)))


@pytest.mark.parametrize(("again", "found"), [([], "step_00000003"), ([2], "step_00000002")])
def test_a_checkpoint_that_latest_does_not_name_yet(
    ranks: RankPool, tmp_path: Path, again: list[int], found: str
) -> None:
    """Completed by a run that was killed before it could write `latest`; or by another run, from which a later one went
    on with a step 2 of its own. Times are those of a copy: the same for all, or the other way round."""
    config = config_in(tmp_path)
    ranks.run(1, save_steps, config, [1, 2, 3])
    ranks.run(1, save_steps, config, again)
    root = tmp_path / "checkpoints"
    (root / "latest").write_text("step_00000002")
    for step in (1, 2, 3):
        os.utime(root / f"step_0000000{step}/manifest.json", (4 - step, 4 - step))
    for folder in ranks.run(2, chosen, config):
        assert folder.endswith(found)


def test_host_memory_is_pinned_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not rounded up, and given back before more is taken."""
    from megabagel.checkpoint import megatron_strategy

    class Runtime:
        held: ClassVar[dict[int, int]] = {}
        seen: ClassVar[list[int]] = []

        def cudaHostRegister(self, at: int, size: int, flags: int) -> int:
            assert not self.held
            self.held[at] = size
            self.seen.append(size)
            return 0

        def cudaHostUnregister(self, at: int) -> int:
            del self.held[at]
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    copies = megatron_strategy.HostCopies()
    for rows in (3, 2, 5):
        data = torch.arange(rows * 7.0).view(rows, 7)
        (part,) = copies.take([megatron_strategy.Part("weight/a", (rows, 7), (0, 0), megatron_strategy._held(data))])
        assert all(torch.equal(read, data) for read in part.data.read())
        assert Runtime.held == {copies.buffer.data_ptr(): len(copies.buffer)}
    assert Runtime.seen == [3 * 28, 5 * 28]


def read_with_seed(config: Config, seed: int) -> str:
    from megabagel.checkpoint import api

    other = replace(config, train=replace(config.train, seed=seed))
    try:
        return str(api.read(Path(config.run.dir) / "checkpoints/step_00000001", other))
    except UserError as error:
        return str(error)


def test_a_seed_belongs_to_the_run(ranks: RankPool, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    ranks.run(1, save_steps, config, [1])
    assert ranks.run(1, read_with_seed, config, 7) == ["(1, {})"]
    (message,) = ranks.run(1, read_with_seed, config, 8)
    assert message.startswith("train.seed=8 ") and "was trained with seed 7" in message
