"""What a checkpoint costs: the stall of training with and without async saving, and rates beside torch and safetensors.

    python benchmarks/checkpoint_io.py [--folder /scratch] [--out benchmarks/results/checkpoint_io.json]

One rank holds weights, two moments and averages of a model of 1 GB and more in fp32. The step that training makes is a
stand-in of a quarter of a second: `device` waits, as a host does for its GPU; `host` computes, and shares the cores
with the writer. `stall` is by how much a save makes training longer: the time of saving itself and what the following
steps take beyond those without a save. All files are flushed to the disk before a save counts as done, by the rivals
too; before a load they are dropped from the system's memory. Everything is measured in one run, in turns; figures are
medians. Needs about five times the checkpoint on disk and three times in memory.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megabagel.config.schema import CheckpointConfig, Config, ModelConfig, RunConfig
from megabagel.runtime import cpu_backend
from megabagel.runtime.device import comm_backend

cpu_backend.install()  # before anything imports megatron

from megatron.core.dist_checkpointing import ShardedTensor  # noqa: E402
from torch.distributed import checkpoint as dcp  # noqa: E402

from megabagel.checkpoint import api  # noqa: E402
from megabagel.checkpoint.reader import verify  # noqa: E402
from megabagel.checkpoint.reshard import reshard  # noqa: E402
from megabagel.model.shapes_only import model_shapes  # noqa: E402
from megabagel.parallel import mesh  # noqa: E402

MODEL = ModelConfig(layers=2, hidden=768, heads=12, kv_heads=4, ffn=2048, vocab=24000, latent_grid=32)
KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
STEP_SECONDS = 0.25


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to put the files for a while")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=MODEL.layers)
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    dist.init_process_group(comm_backend(), store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        found = measure(Path(name), replace(MODEL, layers=args.layers), args.rounds)
    dist.destroy_process_group()
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


def measure(folder: Path, model: ModelConfig, rounds: int) -> dict[str, Any]:
    """All figures."""
    checkpoint, resharded = folder / "run/checkpoints/step_00000001", folder / "resharded"
    config = Config(model=model, run=RunConfig(dir=str(folder / "run")), checkpoint=CheckpointConfig(keep=1))
    grid = mesh.build(config)
    tensors = state_of(model)
    size = sum(tensor.data.nbytes for tensor in tensors.values())
    steps = {"device": lambda: time.sleep(STEP_SECONDS), "host": stand_in()}
    stalls = {name: stall(config, grid, tensors, rounds, work) for name, work in steps.items()}
    saves, loads = Times(), Times()
    for turn in range(rounds):
        for name, save, load in rivals(folder, config, grid, tensors):
            saves.add(name, save)
            drop_cache(folder)
            loads.add(name, load)
        drop_cache(folder)
        saves.add("reshard to tp 2", lambda: reshard(checkpoint, resharded, {"tp": 2}))
        drop_cache(folder)
        loads.add("verify", lambda: verify(checkpoint))
        shutil.rmtree(resharded)
        print(f"round {turn + 1} of {rounds}", flush=True)
    return {
        "bytes": size,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "stall": stalls,
        "written, GB/s": saves.rates(size),
        "read, GB/s": loads.rates(size),
    }


class Times:
    """Seconds by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def add(self, name: str, work: Callable[[], object]) -> None:
        """Time one go."""
        self.seconds.setdefault(name, []).append(seconds(work))

    def rates(self, size: int) -> dict[str, float]:
        """GB/s by name, of the median."""
        return {name: round(size / statistics.median(found) / 1e9, 3) for name, found in self.seconds.items()}


def seconds(work: Callable[[], object]) -> float:
    """Seconds of one go."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def state_of(model: ModelConfig) -> dict[str, ShardedTensor]:
    """Random weights, moments and averages, whole on this rank."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind in KINDS:
        for name, shape in model_shapes(model).items():
            data = torch.randn(shape, generator=generator)
            key = f"{kind}/{name}"
            found[key] = ShardedTensor(key, data, data.dtype, tuple(shape), tuple(shape), (0,) * len(shape), None)
    return found


def stall(
    config: Config, grid: Any, tensors: dict[str, ShardedTensor], rounds: int, work: Callable[[], None]
) -> dict[str, float]:
    """Seconds by which a save makes training longer, blocking and async, in turns."""
    plain, blocking, beside, taken = [], [], [], []
    savers = {on: api.Saver(replace(config, checkpoint=replace(config.checkpoint, async_save=on)), grid)
              for on in (False, True)}  # fmt: skip
    savers[True].save(1, tensors, {})  # allocates the host copy, once per run
    savers[True].wait()
    for _ in range(rounds):
        plain += [seconds(work) for _ in range(4)]
        blocking.append(seconds(lambda: savers[False].save(1, tensors, {})))
        taken.append(seconds(lambda: savers[True].save(1, tensors, {})))
        lost = taken[-1]
        while savers[True].writing:
            lost += seconds(work) - statistics.median(plain) + seconds(savers[True].poll)
        beside.append(lost)
    found = {"step": plain, "blocking": blocking, "async": beside, "of it copying to host memory": taken}
    medians = {f"{name}, s": round(statistics.median(values), 3) for name, values in found.items()}
    return medians | {"blocking / async": round(statistics.median(blocking) / statistics.median(beside), 2)}


def stand_in() -> Callable[[], None]:
    """Work of STEP_SECONDS."""
    a = torch.randn(512, 512)
    count = max(1, int(STEP_SECONDS / statistics.median(seconds(lambda: a @ a) for _ in range(50))))

    def work() -> None:
        for _ in range(count):
            a @ a

    return work


def rivals(folder: Path, config: Config, grid: Any, tensors: dict[str, ShardedTensor]) -> list[tuple[str, Any, Any]]:
    """(name, save, load) of every way to write and read the same numbers."""
    plain = {key: tensor.data for key, tensor in tensors.items()}
    checkpoint, file, dcp_folder = (
        folder / "run/checkpoints/step_00000001",
        folder / "plain.safetensors",
        folder / "dcp",
    )

    def save_plain() -> None:
        save_file(plain, file)
        with file.open("rb") as written:
            os.fsync(written.fileno())

    def load_plain() -> None:
        for key, numbers in load_file(file).items():
            plain[key].copy_(numbers)

    def save_dcp() -> None:
        shutil.rmtree(dcp_folder, ignore_errors=True)
        dcp.save(plain, checkpoint_id=dcp_folder)

    return [
        ("megabagel", lambda: api.save(config, grid, 1, tensors, {}), lambda: api.load(checkpoint, tensors)),
        ("torch DCP", save_dcp, lambda: dcp.load(plain, checkpoint_id=dcp_folder)),
        ("plain safetensors", save_plain, load_plain),
    ]


def drop_cache(folder: Path) -> None:
    """Forget what the system has in memory of these files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    main()
