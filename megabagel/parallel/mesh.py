"""Device mesh: this rank's index and process group on every parallel axis, and joining the job's process group.

A `Mesh` is passed to the code that needs it; only this module reads megatron-core's global `parallel_state`.
"""

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
from megabagel.runtime.device import comm_backend, current_device
from megabagel.runtime.heartbeat import watching
from megabagel.runtime.identity import facts
from megabagel.runtime.launch_env import read_launch_env
from megabagel.runtime.rendezvous import meet
from megabagel.sequence.rank_rows import RankPlace


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh."""

    rank: int
    """This rank's index on the axis."""
    size: int
    group: dist.ProcessGroup
    """The ranks along the axis through this rank."""

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
    """This rank's place on the tensor, pipeline, context and data parallel axes, and on groups that span two axes."""

    world: Axis
    tp: Axis
    pp: Axis
    cp: Axis
    dp: Axis
    tp_cp: Axis
    """All ranks of one pipeline stage that share a pack."""
    dp_cp: Axis
    """All ranks that hold the same weights, over which gradients are summed."""

    @property
    def place(self) -> RankPlace:
        """This rank's indices among the ranks that share a pack."""
        # `RankPack.vae_rank` computes the index in the tp_cp group from these two, so megatron-core's order matters.
        place = RankPlace(self.tp.rank, self.cp.rank, self.pp.first, self.pp.last)
        assert self.tp_cp.rank == self.cp.rank * self.tp.size + self.tp.rank, "ranks of a stage: tp fastest, then cp"
        return place

    def describe(self) -> str:
        """Return the grid in one line, for the log."""
        axes = {"tp": self.tp, "pp": self.pp, "cp": self.cp, "dp": self.dp}
        return " x ".join(f"{name} {axis.size}" for name, axis in axes.items())


def single_mesh() -> Mesh:
    """Return the mesh of one device without a job: every axis has size 1 and no process group.

    For a forward pass in a notebook or a test. Code that communicates checks the size of its axis first.
    """
    alone = Axis(0, 1, None)  # type: ignore[arg-type]
    return Mesh(world=alone, tp=alone, pp=alone, cp=alone, dp=alone, tp_cp=alone, dp_cp=alone)


@contextmanager
def distributed(config: Config) -> Iterator[Mesh]:
    """Join the job's process group and build the mesh of `config`; destroy both at the end.

    Raises:
        UserError: the world size does not fit the grid (raised on every rank), or as `joined`.
        RankLost: as `joined`.
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

    Ranks are those of torchrun's or srun's environment variables; without either, the job is this process alone
    (`runtime.launch_env`).

    Args:
        run: time limits; None: the defaults.
        told: settings and versions that must be equal on all ranks (`identity.facts`); None: software versions only.

    Yields:
        The world axis.

    Raises:
        UserError: a rank does not start in time, or differs in `told`.
        RankLost: a rank died or hangs.
    """
    run = run or RunConfig()
    rank, size, local_rank = read_launch_env()
    # Without a limit every rank on this host would start a thread per core. OMP_NUM_THREADS, if set, is already in
    # effect in torch.
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of(local_rank, torch.cuda.device_count()))
    elif "OMP_NUM_THREADS" not in os.environ:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("SLURM_NTASKS_PER_NODE", size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    # Before the first import of megatron, which is in `build`.
    cpu_backend.install()
    store, signs = meet(rank, size, run, facts(None) if told is None else told)
    with watching(signs, rank, size, run):
        group = dist.PrefixStore("group", store)
        # With its device NCCL connects now instead of in the first collective, and subgroups are split from this group.
        device = current_device() if torch.cuda.is_available() else None
        dist.init_process_group(
            comm_backend(), store=group, rank=rank, world_size=size, timeout=patience(run), device_id=device
        )
        try:
            world = dist.group.WORLD
            assert world is not None
            yield Axis(rank, size, world)
        # These two are raised on all ranks together. On any other error this rank fails alone and keeps the group until
        # its process ends: destroying it would wait in NCCL for ranks that have not noticed, and the heartbeat could
        # not report the failure.
        except (UserError, Stopped):
            dist.destroy_process_group()
            raise
        dist.destroy_process_group()


def patience(run: RunConfig) -> timedelta:
    """Return the timeout of collectives: 60 s more than `run.timeout`."""
    # The heartbeat ends a hung job after run.timeout and names the missing rank; torch's own timeout does not.
    return timedelta(seconds=run.timeout + 60)


def device_of(local_rank: int, visible: int) -> int:
    """Return the GPU index of a rank among the GPUs that its process sees.

    Args:
        local_rank: index of the rank on its host.
        visible: number of GPUs that the process sees.

    Raises:
        UserError: several GPUs are visible, but fewer than there are ranks on the host.
    """
    # Slurm can bind one GPU to each task, which then sees it as number 0.
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"local rank {local_rank}, but this process sees {visible} GPUs: expected a GPU per rank. Start as many "
            "ranks per host as it has GPUs (--ntasks-per-node, --nproc-per-node, --nproc)."
        )
    return local_rank


def build(config: Config) -> Mesh:
    """Create megatron-core's groups for the grid of `config` in the running process group and return the mesh."""
    # Imported here: on a machine without CUDA, `cpu_backend.install()` has to run before.
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
    """Destroy megatron-core's groups and buffers, so that another grid can be built in this process."""
    from megatron.core import parallel_state as state

    state.destroy_model_parallel()
