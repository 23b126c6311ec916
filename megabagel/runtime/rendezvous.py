"""Rendezvous: ranks join the job's store and prove, before any process group exists, that they belong together.

Keys of this roll call, each signed (`signed_store.py`):

    seen-3    without group prefix: the job of the process that is rank 3, for the message about an absent rank
    here-3    host, process and a digest of the facts of rank 3; a second process with this number is refused
    facts-3   the facts themselves; rank 0 reads those of a rank whose digest differs
    roll      rank 0's outcome: "" or the message that every rank ends with
    read-3    rank 3 has read the outcome
"""

import hashlib
import ipaddress
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megabagel.config.schema import RunConfig
from megabagel.errors import UserError
from megabagel.runtime.identity import Identity, first_difference
from megabagel.runtime.launch_env import rendezvous_endpoint, several_hosts
from megabagel.runtime.signed_store import SECRET, SignedStore, job_secret

_NAMED = 8
"""Number of ranks that a message names one by one."""
_LINGER_S = 3.0
_POLL_S = 0.1

logger = logging.getLogger(__name__)


def meet(rank: int, size: int, run: RunConfig, facts: Mapping[str, str]) -> tuple[dist.Store, SignedStore]:
    """Join the job's store, and check within `run.start_timeout` seconds that all ranks are there with equal facts.

    Rank 0 opens the store; under torchrun its agent has done so already. A single rank opens none.

    Args:
        rank: this rank.
        size: number of ranks.
        run: time limit `start_timeout`, seconds.
        facts: name -> value of everything that must be equal on all ranks.

    Returns:
        The store of the process group, and a second connection for heartbeats: a thread that waits on one connection
        does not block writes on the other.

    Raises:
        UserError: ranks are absent or differ; on every rank alike.
    """
    if size == 1:
        alone = dist.HashStore()
        return alone, SignedStore(alone)
    address, port = rendezvous_endpoint()
    # Libraries that create process groups of their own read these variables.
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if rank == 0 and not job_secret():
        logger.warning(
            "%s is not set: whoever reaches port %d of %s may end this run. --nproc and the sbatch scripts set it; "
            "elsewhere export it, the same on every rank, before the start",
            *(SECRET, port, address),
        )
    identity = Identity.of()
    group = f"{identity.job}.{identity.step}.{identity.attempt}"
    store = _connect(opens, rank, size, run)
    _RollCall(store, group, identity, rank, size).answer(facts, run.start_timeout)
    return dist.PrefixStore(group, store), SignedStore(_connect(False, rank, size, run), group)


def _connect(opens: bool, rank: int, size: int, run: RunConfig) -> dist.Store:
    """Connect to the job's TCPStore, opening it if `opens`. Raises UserError."""
    address, port = rendezvous_endpoint()
    try:
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=opens,
            timeout=timedelta(seconds=run.start_timeout),
            wait_for_workers=False,
            master_listen_fd=_listening(address, port).detach() if opens else None,
        )
    except (dist.DistNetworkError, dist.DistStoreError, OSError) as error:
        raise UserError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: rank {rank} of {size} cannot meet the others there "
            f"({str(error).splitlines()[0]}): name a host that every rank reaches and a port free on it, and start all "
            f"ranks, rank 0 among them, within run.start_timeout={run.start_timeout:g} s"
        ) from None


def _listening(address: str, port: int) -> socket.socket:
    """Return a socket that listens on the interface of `address` alone; torch's own listens on all. Raises OSError."""
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    if several_hosts() and _loopback(str(place[0])) and not _is_number(address):
        # Debian's /etc/hosts gives a host's own name 127.0.1.1: bound there, other hosts would not reach it.
        logger.warning("%s is a loopback address here, but ranks are on several hosts: listening on all", address)
        place = ("", port)
        family = socket.AF_INET
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(socket.SOMAXCONN)
    except OSError:
        listener.close()
        raise
    return listener


def _loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _is_number(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return True


class _RollCall:
    """Roll call from the side of one rank."""

    def __init__(self, store: dist.Store, group: str, identity: Identity, rank: int, size: int) -> None:
        """Prefix the store for this group.

        Args:
            store: the job's store.
            group: prefix of the keys of this start of the job.
            identity: job, step and start of this process.
            rank: this rank.
            size: number of ranks.
        """
        self.identity, self.rank, self.size = identity, rank, size
        self.common, self.roll = SignedStore(store), SignedStore(store, group)

    def answer(self, facts: Mapping[str, str], seconds: float) -> None:
        """Publish this rank's identity and facts, and wait for rank 0's outcome. Raises UserError."""
        end = time.monotonic() + seconds
        try:
            self.common.set(f"seen-{self.rank}", str(self.identity))
            self.roll.set(f"facts-{self.rank}", facts)
            self._take_place({"who": _who(), "digest": _digest(facts)})
            outcome = self._judge(facts, end, seconds) if self.rank == 0 else self._outcome(end, seconds)
        except dist.DistNetworkError:
            raise UserError(
                f"rank 0 of {self.size} has ended while rank {self.rank} waited for others: see its message"
            ) from None
        if outcome:
            raise UserError(outcome)

    def _take_place(self, mine: dict[str, str]) -> None:
        """Raise UserError if another process has this rank already: from an earlier start, or started twice."""
        holder = self.roll.claim(f"here-{self.rank}", mine)
        if holder != mine:
            raise UserError(
                f"rank {self.rank} of {self.size} is {holder['who']} already, and {_who()} was started as the same: "
                "expected one process per rank. End what is left of an earlier start, and start the job again."
            )

    def _judge(self, facts: Mapping[str, str], end: float, seconds: float) -> str:
        """On rank 0: wait for all ranks, compare them and publish the outcome."""
        here = self._collect(end)
        if absent := [rank for rank in range(self.size) if rank not in here]:
            outcome = self._absent(absent, seconds)
        else:
            outcome = self._difference(here, facts) or ""
        self.roll.set("roll", outcome)
        if outcome:
            self._linger(set(here) - {0})
        return outcome

    def _collect(self, end: float) -> dict[int, Any]:
        """Return the `here` values of all ranks, or of those that came in time."""
        keys = {f"here-{rank}": rank for rank in range(self.size)}
        try:
            while True:
                self.roll.wait(list(keys), end - time.monotonic())
                found = self.roll.get_many(keys)
                if len(found) == self.size or time.monotonic() > end:
                    break
                # A key exists, but not with a valid signature: the rank itself may still come.
                time.sleep(_POLL_S)
        except dist.DistStoreError:
            missing = set(self.roll.absent(keys))
            found = self.roll.get_many(key for key in keys if key not in missing)
        return {keys[key]: value for key, value in found.items()}

    def _difference(self, here: Mapping[int, Any], facts: Mapping[str, str]) -> str | None:
        """Return the message about ranks whose facts differ from rank 0's, or None."""
        others = [rank for rank, told in here.items() if told["digest"] != here[0]["digest"]]
        theirs = self.roll.get_many(f"facts-{rank}" for rank in others)
        by_rank = {rank: theirs.get(f"facts-{rank}", {}) for rank in others}
        return first_difference({0: facts, **by_rank}, {rank: told["who"] for rank, told in here.items()})

    def _outcome(self, end: float, seconds: float) -> str:
        """On other ranks: wait for rank 0's outcome."""
        try:
            while True:
                self.roll.wait(["roll"], end - time.monotonic())
                if (outcome := self.roll.get("roll")) is not None:
                    self.roll.set(f"read-{self.rank}", "")
                    return str(outcome)
                time.sleep(_POLL_S)
        except dist.DistStoreError:
            missing = set(self.roll.absent(f"here-{rank}" for rank in range(self.size)))
            absent = [rank for rank in range(self.size) if f"here-{rank}" in missing]
            return self._absent(absent or [0], seconds)

    def _absent(self, ranks: list[int], seconds: float) -> str:
        """Return the message about ranks that did not come, or came to another group."""
        strangers = [self._stranger(rank) for rank in ranks[:_NAMED]]
        found = "".join(f" {text}." for text in strangers if text)
        return (
            f"{_named(ranks)} of {self.size} did not start within run.start_timeout={seconds:g} s (rank {self.rank} "
            f"waits on {socket.gethostname()}).{found} Look at the absent ones' own messages and hosts, and start the "
            "job again."
        )

    def _stranger(self, rank: int) -> str:
        """Describe a process that came with the number of an absent rank but another identity or secret."""
        if self.common.absent([f"seen-{rank}"]):
            return ""
        told = self.common.get(f"seen-{rank}")
        if told is None:
            return f"A process came as rank {rank} with another {SECRET}"
        other = told != str(self.identity)
        return f"A process came as rank {rank} of {told}, but this is {self.identity}" if other else ""

    def _linger(self, ranks: set[int]) -> None:
        """Keep the store, which ends with rank 0's process, until the other ranks have read the outcome."""
        keys, end = [f"read-{rank}" for rank in sorted(ranks)], time.monotonic() + _LINGER_S
        while self.roll.absent(keys) and time.monotonic() < end:
            time.sleep(0.01)


def _who() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _digest(facts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _named(ranks: list[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:_NAMED]))}{more}"
