"""The grid of ranks: one value that knows this rank's place on every axis, handed to whoever needs it."""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megabagel.config.checks import check_world
from megabagel.config.schema import Config, RunConfig
from megabagel.errors import Stopped, UserError
from megabagel.runtime import cpu_backend
from megabagel.runtime.device import comm_backend
from megabagel.runtime.heartbeat import watching
from megabagel.runtime.identity import facts
from megabagel.runtime.launch_env import read_launch_env
from megabagel.runtime.rendezvous import meet
from megabagel.sequence.rank_rows import RankPlace


@dataclass(frozen=True)
class Axis:
    """One axis of the grid: this rank's index on it, its size, and the group of ranks along it."""

    rank: int
    size: int
    group: dist.ProcessGroup

    @property
    def first(self) -> bool:
        """Whether this rank is first on the axis."""
        return self.rank == 0

    @property
    def last(self) -> bool:
        """Whether this rank is last on the axis."""
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Mesh:
    """This rank's place: tensor, pipeline, context and data parallel axes, and the groups that span two of them."""

    world: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    tp_cp: Axis
    """All ranks of one stage that share a pack."""
    dp_cp: Axis
    """All ranks that hold the same weights."""

    @property
    def place(self) -> RankPlace:
        """This rank among those that share a pack."""
        place = RankPlace(self.tp.rank, self.cp.rank, self.pp.first, self.pp.last)
        assert self.tp_cp.rank == self.cp.rank * self.tp.size + self.tp.rank, "ranks of a stage: tp fastest, then cp"
        return place

    def describe(self) -> str:
        """The grid in a line."""
        axes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        return " x ".join(f"{name} {axis.size}" for name, axis in axes.items())


def single_mesh() -> Mesh:
    """Return the mesh of one device that belongs to no job: every axis has size 1 and no process group.

    For a forward pass in a notebook or a test. Code that would exchange something finds axes of size 1 and does not.
    """
    alone = Axis(0, 1, None)  # type: ignore[arg-type]
    return Mesh(world=alone, tp=alone, pp=alone, cp=alone, dp=alone, tp_cp=alone, dp_cp=alone)


@contextmanager
def distributed(config: Config) -> Iterator[Mesh]:
    """Join the job's process group, build the grid, and take both down at the end.

    Raises UserError when the world size does not fit the grid, on every rank alike.
    """
    check_world(config, read_launch_env()[1])
    with joined(config.run, facts(config)):
        try:
            yield build(config)
        finally:
            teardown()


@contextmanager
def joined(run: RunConfig | None = None, told: Mapping[str, str] | None = None) -> Iterator[Axis]:
    """Join the job's process group, without a grid, and leave it at the end.

    Who is who comes from torchrun's variables, from srun's or, alone, from nowhere (`launched.py`). `run` holds the
    limits of waiting; `told` is what must be equal on all ranks (`identity.facts`), by default software alone. Raises
    UserError when a rank does not start or differs, RankLost when one dies or hangs.
    """
    run = run or RunConfig()
    rank, size, local_rank = read_launch_env()
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of(local_rank, torch.cuda.device_count()))
    elif "OMP_NUM_THREADS" not in os.environ:  # torch has heeded it already
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    cpu_backend.install()
    store, signs = meet(rank, size, run, facts(None) if told is None else told)
    with watching(signs, rank, size, run):
        group = dist.PrefixStore("group", store)
        dist.init_process_group(comm_backend(), store=group, rank=rank, world_size=size, timeout=patience(run))
        try:
            world = dist.group.WORLD
            assert world is not None
            yield Axis(rank, size, world)
        except (UserError, Stopped):
            dist.destroy_process_group()  # of all ranks alike
            raise
        # A rank that fails alone keeps the group until its process ends: NCCL would wait for the others here, who do
        # not know yet, and the failure would never be told.
        dist.destroy_process_group()


def patience(run: RunConfig) -> timedelta:
    """How long a collective may take: a little longer than the ranks take to find out whom it waits for."""
    return timedelta(seconds=run.timeout + 60)


def device_of(local_rank: int, visible: int) -> int:
    """The GPU of a rank, of those that its process sees: the only one where each task was given its own.

    Raises UserError when there are several, and fewer than ranks on the host.
    """
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank}, but this process sees {visible} GPUs: expected a GPU per rank. Start as many "
            "ranks per host as it has GPUs (--ntasks-per-node, --nproc-per-node, --nproc)."
        )
    return local_rank


def build(config: Config) -> Mesh:
    """Make megatron-core's groups for the config's grid inside the running process group."""
    from megatron.core import parallel_state as state

    grid = config.parallel
    state.initialize_model_parallel(
        tensor_model_parallel_size=grid.tp,
        pipeline_model_parallel_size=grid.pp,
        virtual_pipeline_model_parallel_size=grid.vpp if grid.vpp > 1 else None,
        context_parallel_size=grid.cp,
        distributed_timeout_minutes=math.ceil(patience(config.run) / timedelta(minutes=1)),
        create_gloo_process_groups=False,
    )

    def axis(group: dist.ProcessGroup | None) -> Axis:
        assert group is not None
        return Axis(group.rank(), group.size(), group)

    return Mesh(
        world=axis(dist.group.WORLD),
        tp=axis(state.get_tensor_model_parallel_group()),
        pp=axis(state.get_pipeline_model_parallel_group()),
        cp=axis(state.get_context_parallel_group()),
        dp=axis(state.get_data_parallel_group()),
        tp_cp=axis(state.get_tensor_and_context_parallel_group()),
        dp_cp=axis(state.get_data_parallel_group(with_context_parallel=True)),
    )


def teardown() -> None:
    """Forget megatron-core's groups and buffers, so that another grid can be built in this process."""
    from megatron.core import parallel_state as state

    state.destroy_model_parallel()
