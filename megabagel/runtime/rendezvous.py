"""Where ranks meet before there is a process group: the job's store, and a roll call that names who is absent."""

import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from megabagel.config.schema import RunConfig
from megabagel.errors import UserError
from megabagel.runtime.launch_env import rendezvous_endpoint

_NAMED = 8
"""Ranks that a message names one by one."""
_LINGER_S = 3.0


def meet(rank: int, size: int, run: RunConfig) -> tuple[dist.Store, dist.Store]:
    """Join the store at the job's meeting point and wait until all ranks have, at most `run.start_timeout` seconds.

    Rank 0 opens the store; under torchrun its agent has done so. Alone, nothing is opened. Raises UserError.

    Returns two connections to the same store: a thread that waits on one does not hold up what another says.
    """
    if size == 1:
        alone = dist.HashStore()
        return alone, alone
    address, port = rendezvous_endpoint()
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}  # for libraries that make groups of their own
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(attempt, _connect(opens, rank, size, run))
    _roll_call(store, rank, size, run.start_timeout)
    return store, dist.PrefixStore(attempt, _connect(False, rank, size, run))


def _connect(opens: bool, rank: int, size: int, run: RunConfig) -> dist.Store:
    address, port = rendezvous_endpoint()
    try:
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=opens,
            timeout=timedelta(seconds=run.start_timeout),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: rank {rank} of {size} cannot meet the others there "
            f"({str(error).splitlines()[0]}): name a host that every rank reaches and a port free on it, and start all "
            f"ranks, rank 0 among them, within run.start_timeout={run.start_timeout:g} s"
        ) from error


def _roll_call(store: dist.Store, rank: int, size: int, seconds: float) -> None:
    """Wait for all ranks; the last one to come tells the others. Raises UserError, naming the absent ones."""
    store.set(f"here-{rank}", "")
    present = store.add("here", 1)
    try:
        if present == size:
            store.set("complete", "")
        store.wait(["complete"], timedelta(seconds=seconds))
    except dist.DistNetworkError:
        raise UserError(f"rank 0 of {size} has ended while rank {rank} waited for others: see its message") from None
    except dist.DistStoreError:
        absent = [other for other in range(size) if not store.check([f"here-{other}"])]
        _linger(store, rank, size - len(absent))
        raise UserError(
            f"{_named(absent)} of {size} did not start within run.start_timeout={seconds:g} s (rank {rank} waits on "
            f"{socket.gethostname()}). Look at the absent ones' own messages and hosts, and start the job again."
        ) from None


def _linger(store: dist.Store, rank: int, present: int) -> None:
    """Rank 0 may hold the store: it stays a little for those that look into it."""
    looked, end = store.add("looked", 1), time.monotonic() + _LINGER_S
    while rank == 0 and looked < present and time.monotonic() < end:
        time.sleep(0.01)
        looked = store.add("looked", 0)


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_NAMED]))}{more}"
