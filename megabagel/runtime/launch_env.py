"""Launcher variables: this process's rank, the number of ranks, and the address where they meet.

Three launchers are supported: torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; `--nproc` sets the
same), srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID), and none. Others are
refused by name: without that, each of their processes would train alone, all in one run.dir.
"""

import os
import re
from collections.abc import Mapping

from megabagel.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
PORTS = range(20000, 40000)
"""Ports of Slurm steps without MASTER_PORT: chosen by job and step, so that jobs on one node differ."""
_STEP_STRIDE = 7919
"""Distance between the ports of steps of one job: a prime, so that the next job's port is not the next step's."""
FOREIGN = (
    ("Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MVAPICH's mpirun", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK"),
    ("PALS (mpiexec, aprun)", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    ("ALPS (aprun)", "ALPS_APP_PE", "", ""),
    ("Flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    ("Hydra or another PMI launcher (mpiexec)", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("a PMIx launcher", "PMIX_RANK", "", ""),
)
"""(launcher, its variables of rank, number of ranks and local rank)."""
_OF_SLURM = ("PMI_RANK", "PMIX_RANK")
"""Also set by srun, with --mpi=pmi2 or pmix."""


def read_launch_env(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """Return (rank, world size, local rank) from torchrun's or srun's variables; (0, 1, 0) without a launcher.

    Raises:
        UserError: variables are missing or contradict each other, or another launcher started this process.
    """
    names = TORCHRUN if env.get("RANK") else SRUN
    if names is SRUN:
        refuse_foreign(env)
    if not env.get(names[1]) and names is SRUN:
        _refuse_batch_script(env)
        return 0, 1, 0
    missing = " and ".join(name for name in names if not env.get(name))
    if missing:
        raise UserError(
            f"{names[0]}={env.get(names[0])}, but {missing} is not set: start with srun, torchrun or --nproc, set all "
            f"of {', '.join(names)}, or unset {names[0]} to train alone"
        )
    pairs = ", ".join(f"{name}={env[name]}" for name in names)
    try:
        rank, size, local_rank = (int(env[name]) for name in names)
    except ValueError:
        raise UserError(f"{pairs}: expected whole numbers; start with torchrun, srun or --nproc") from None
    if not 0 <= rank < size or not 0 <= local_rank < size:
        raise UserError(f"{pairs}: expected both ranks below the world size; start with torchrun, srun or --nproc")
    return rank, size, local_rank


def refuse_foreign(env: Mapping[str, str] = os.environ) -> None:
    """Raise UserError if an unsupported launcher has started this process as one of several."""
    slurm = env.get(SRUN[1])
    for launcher, rank, size, local in FOREIGN:
        if not env.get(rank) or env.get(size) == "1":
            continue
        if slurm and rank in _OF_SLURM and env.get(size, slurm) == slurm:
            continue  # as many ranks as srun's step has: srun's own. mpiexec within a job starts others.
        known = f"RANK=${rank} WORLD_SIZE=${size} LOCAL_RANK=${local}" if local else "RANK, WORLD_SIZE and LOCAL_RANK"
        raise UserError(
            f"{rank}={env[rank]}: started by {launcher}, which is not understood: every process would train alone. "
            f"Start with srun, torchrun or --nproc, or set {known}, MASTER_ADDR and MASTER_PORT for each process."
        )


def several_hosts(env: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher's variables say that ranks run on several hosts."""
    size, local = env.get("WORLD_SIZE"), env.get("LOCAL_WORLD_SIZE")
    if env.get(TORCHRUN[0]):
        return size != local
    return env.get("SLURM_STEP_NUM_NODES", "1") != "1"


def _refuse_batch_script(env: Mapping[str, str]) -> None:
    """Raise UserError in a batch script: it has the job's variables, but only processes started by srun are ranks."""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun: expected `srun megabagel train ...` in "
            "the batch script (examples/slurm/train.sbatch), or --nproc to start ranks on this node alone"
        )


def rendezvous_endpoint(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Return (address, port) where the ranks of a job meet: rank 0's host.

    MASTER_ADDR and MASTER_PORT if set; otherwise, under srun, the first host of the step and a port by job and step.

    Raises:
        UserError: neither is there, or the port is invalid.
    """
    hosts, job = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_JOB_ID", "")
    address = env.get("MASTER_ADDR") or (first_host(hosts) if hosts else None)
    step = int(env.get("SLURM_STEP_ID", "")) if env.get("SLURM_STEP_ID", "").isdecimal() else 0
    by_number = str(PORTS[(int(job) + _STEP_STRIDE * step) % len(PORTS)]) if job.isdecimal() else None
    port = env.get("MASTER_PORT") or by_number
    for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)):
        if value is None:
            raise UserError(
                f"{name} is not set for a job of several ranks: start with srun, torchrun or --nproc, or export it"
            )
    assert address and port
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT={port}: expected a port between 1 and 65535, free on {address}")
    return address, int(port)


def first_host(hosts: str) -> str:
    """First name of Slurm's shorthand for a list of hosts.

    >>> first_host("gpu[007-012,20],login1")
    'gpu007'
    >>> first_host("rack3-n[1,4]-ib[0-1]")
    'rack3-n1-ib0'
    """
    found = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", hosts)
    name = found.group() if found else ""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", name)
