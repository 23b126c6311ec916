"""A clumsy user's bench: a tiny run, ways to start it as a real job, and what a good refusal looks like."""

import io
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from megabagel import cli
from megabagel.config.load import dump
from megabagel.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ResizeConfig,
    RunConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
    VitConfig,
)
from megabagel.data.formats.shards import write_shards
from megabagel.errors import ERROR_PREFIX, USER_ERROR
from tests.support.config_tree import change
from tests.support.pictures import file_of, noise
from tests.support.rank_pool import RankPool

HERE = Path(__file__).parents[2]
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Samples = Iterable[tuple[str, Mapping[str, bytes]]]

TINY = Config(
    model=ModelConfig(
        layers=2,
        hidden=32,
        heads=4,
        kv_heads=2,
        ffn=32,
        vocab=264,
        vit=VitConfig(layers=1, hidden=32, heads=4, ffn=32, grid=8),
        latent_grid=8,
    ),
    parallel=ParallelConfig(chunk=8),
    data=DataConfig(
        sources=(SourceConfig("pairs", "pairs-*.tar", "t2i"),),
        min_tokens=40,
        max_tokens=64,
        lookahead=4,
        vae_resize=ResizeConfig(max_size=32, min_size=16),
        vit_resize=ResizeConfig(max_size=28, min_size=14),
    ),
    train=TrainConfig(steps=2, packs_per_step=2),
    telemetry=TelemetryConfig(tensorboard=False, peak_tflops=1.0),
)
"""Some ten milliseconds per step."""


def pairs(count: int) -> list[tuple[str, dict[str, bytes]]]:
    """Samples of a small picture and a caption."""
    return [(f"{i:04d}", {"png": file_of(noise(32, 32, seed=i)), "txt": f"picture {i}".encode()}) for i in range(count)]


def tiny_run(folder: Path, samples: Samples, per_shard: int = 100) -> Path:
    """Write `folder/data` and the config of a run in `folder/run`; returns the config's path."""
    (folder / "data").mkdir(parents=True)
    write_shards(folder / "data", "pairs", samples, per_shard)
    config = change(TINY, {"run": RunConfig(dir=str(folder / "run")), "data.root": str(folder / "data")})
    dump(config, folder / "tiny.yaml")
    return folder / "tiny.yaml"


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Outcome:
    """How a job ended: exit codes and stderr by rank (or of its launcher alone), and the stdout of rank 0."""

    codes: tuple[int, ...]
    errors: tuple[str, ...]
    out: str

    def refused(self, *parts: object, code: int = USER_ERROR) -> None:
        """Assert that all ranks ended with one message that holds all `parts`, and that nobody saw a traceback."""
        assert set(self.codes) == {code}, self
        assert "Traceback" not in self.out
        for text in self.errors:
            assert "Traceback" not in text, text
            assert text.count(ERROR_PREFIX) == 1, text
            message = text.partition(ERROR_PREFIX)[2]
            assert not [part for part in parts if str(part) not in message], message

    def succeeded(self) -> "Outcome":
        """Assert that it did."""
        assert not any(self.codes), self
        return self


def command(*words: object, **env: str) -> Outcome:
    """Run the command line in a process of its own."""
    clean = {name: value for name, value in os.environ.items() if name not in PLACE}
    result = subprocess.run(
        [sys.executable, "-m", "megabagel", *map(str, words)],
        env={**clean, "OMP_NUM_THREADS": "1", **env},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome((result.returncode,), (result.stderr,), result.stdout)


def job(ranks: RankPool, size: int, *words: object, file_limit: int | None = None, **place: str) -> Outcome:
    """Run `megabagel train WORDS` as `size` ranks that are told their place as torchrun tells it, or by `place`.

    A rank that waits for ever makes it fail with RankError. `file_limit` is the size that no file may exceed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), **place}
        place = {"MEGABAGEL_JOB_SECRET": "of a test", **place}
    with tempfile.TemporaryDirectory() as folder:
        results = ranks.run(size, as_rank, [*map(str, words)], place, file_limit, f"{folder}/store", timeout=60)
    codes, errors, outs = zip(*results, strict=True)
    assert not any(outs[1:]), "only rank 0 writes to stdout"
    return Outcome(codes, errors, outs[0])


def as_rank(words: list[str], place: dict[str, str], file_limit: int | None, store: str) -> tuple[int, str, str]:
    """One rank of a job, in a worker of the pool: (exit code, stderr, stdout). It leaves the pool's group meanwhile."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    for handler in logging.getLogger().handlers[:]:  # of an earlier job
        logging.getLogger().removeHandler(handler)
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        **place,
    }
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.dict(os.environ, place), redirect_stdout(out), redirect_stderr(err), _files_limited(file_limit):
        code = cli.main(["train", *words])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    return code, err.getvalue(), out.getvalue()


@contextmanager
def _files_limited(size: int | None) -> Iterator[None]:
    """Larger files cannot be written by this process and those that it starts; what was allowed comes back."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size or before[0], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def once_training(folder: Path, action: Callable[[], object]) -> Iterator[None]:
    """Do `action` from a thread as soon as the run in `folder` has finished a step."""
    over = threading.Event()
    done = []

    def watch() -> None:
        while not over.wait(0.01):
            if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size:
                done.append(action())
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert done, "the run did not get that far"


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """Mount a file system of its own at `folder`; whether this user may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int = 0) -> Path:
    """Take all room but `leave` kilobytes of the file system of `folder`; returns the file that holds it."""
    filler = folder / f"filler-{time.monotonic_ns()}"
    state = os.statvfs(folder)
    filler.write_bytes(bytes(state.f_bavail * state.f_frsize - 1024 * leave))
    return filler
