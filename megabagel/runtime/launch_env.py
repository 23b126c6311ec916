"""What the launcher tells a process: its rank among how many, and where all of them meet.

Three launchers are understood: torchrun (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; `--nproc` sets the
same), srun (SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID), and none.
"""

import os
import re
from collections.abc import Mapping

from megabagel.errors import UserError

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
PORTS = range(20000, 40000)
"""Where a Slurm job meets unless MASTER_PORT is set: a port by its number, so that jobs on one node differ."""


def read_launch_env(env: Mapping[str, str] = os.environ) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun tells them; (0, 1, 0) alone.

    Raises UserError when variables are missing or contradict each other.
    """
    names = TORCHRUN if env.get("RANK") else SRUN
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


def _refuse_batch_script(env: Mapping[str, str]) -> None:
    """A batch script has a job's variables, but only what srun starts there is a rank."""
    tasks = env.get("SLURM_NTASKS", "1")
    if "SLURM_JOB_ID" in env and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS={tasks}, but this process was not started by srun: expected `srun megabagel train ...` in "
            "the batch script (examples/slurm/train.sbatch), or --nproc to start ranks on this node alone"
        )


def rendezvous_endpoint(env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(address, port) at which the ranks of a job of several meet: rank 0's host.

    MASTER_ADDR and MASTER_PORT where set; else under srun the first host of the step and a port by the job's number.
    Raises UserError when there is nothing to go by, or the port is none.
    """
    hosts, job = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_JOB_ID", "")
    address = env.get("MASTER_ADDR") or (first_host(hosts) if hosts else None)
    port = env.get("MASTER_PORT") or (str(PORTS[int(job) % len(PORTS)]) if job.isdecimal() else None)
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
