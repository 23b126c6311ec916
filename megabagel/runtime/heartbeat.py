"""Heartbeats: every rank reports its position to the job's store, so that a dead or hung rank ends the job by name.

Two threads per rank. The first writes this rank's heartbeat once a second and reads the verdict, the message that ends
the job. On rank 0 it also reads all heartbeats and writes the verdict; on other ranks it watches rank 0. The second
thread measures time, because a request to a store whose host is gone may block for ever. Either can end the process
while its main thread is stuck in a collective. Rules: docs/faults.md#ranks-that-are-lost.

    beat-3    {"n": 17, "step": 12, "phase": "forward", "age": 0.4, "marks": 230, "collective": null, "at": ...}
    verdict   the message that every rank ends with
    suspect   a rank lost a connection: rank 0 shortens its patience
    left-3    rank 3 has stopped listening

All are signed (`signed_store.py`); an unsigned value, or an older heartbeat written again, counts as absent.
"""

import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch.distributed as dist

from megabagel.config.schema import RunConfig
from megabagel.errors import STOP_PREFIX, RankLost, Stopped, UserError, printable
from megabagel.runtime import phase
from megabagel.runtime.diagnosis import Beat, judge, read_beat
from megabagel.runtime.signed_store import SignedStore

_BEAT_S = 1.0
"""Seconds between heartbeats."""
_SUSPECTED_S = 3.0
"""Silence that condemns a rank once a connection was lost: well above `_BEAT_S`, well below the time after which a
launcher kills the ranks."""
_FAREWELL_S = 3.0
"""Seconds that a rank that ends by itself waits for the others to notice."""


@contextmanager
def watching(store: SignedStore, rank: int, size: int, run: RunConfig) -> Iterator[None]:
    """Send and watch heartbeats inside the block.

    A rank that fails by itself publishes its error, which then propagates. A rank that is stuck in a collective when
    the verdict comes prints it and exits with `RankLost.code`.

    Args:
        store: the job's store; a connection of its own, see `rendezvous.meet`.
        rank: this rank.
        size: number of ranks.
        run: time limits `heartbeat_timeout` and `timeout`, seconds.

    Raises:
        RankLost: names the lost rank; raised in place of the error that its end caused here (a broken connection).
    """
    phase.reset()
    life = _Heartbeat(store, rank, size, run)
    life.start()
    patience = _FAREWELL_S
    try:
        yield
        patience = run.heartbeat_timeout
    except (UserError, Stopped):
        patience = run.heartbeat_timeout
        raise  # of all ranks alike
    except Exception as error:
        verdict = life.explain(error)
        if verdict is None:
            raise
        raise RankLost(verdict) from error
    finally:
        life.stop(patience)


class _Heartbeat:
    """The two threads of a rank and what they have read."""

    def __init__(self, store: SignedStore, rank: int, size: int, run: RunConfig) -> None:
        """See `watching` for the parameters."""
        self._store, self._rank, self._size, self._run = store, rank, size, run
        self._every = min(_BEAT_S, run.heartbeat_timeout / 4)
        self._leaving = threading.Event()
        self._explaining = threading.Event()
        self._judged = threading.Event()
        self._verdict = ""
        self._origin: phase.Location | None = None
        self._talked = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._keep_time)]
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self, patience: float) -> None:
        """End both threads, then wait up to `patience` seconds for the other ranks to leave.

        Rank 0 may hold the store, which ends with its process.
        """
        self._leaving.set()
        self._threads[0].join(timeout=_FAREWELL_S)
        if self._threads[0].is_alive():
            # Blocked in a request: the store's host is gone.
            return
        with suppress(dist.DistError):
            self._store.set(f"left-{self._rank}", "")
            end = time.monotonic() + patience
            staying = [f"left-{rank}" for rank in range(self._size)] if self._rank == 0 else []
            while (staying := [key for key in staying if self._store.get(key) is None]) and time.monotonic() < end:
                time.sleep(0.01)

    def explain(self, error: Exception) -> str | None:
        """Return the verdict if another rank caused `error`; otherwise publish this rank's failure and return None.

        Args:
            error: raised in the main thread.
        """
        self._origin = phase.origin(error)
        self._explaining.set()
        with suppress(dist.DistError):
            # A lost connection is usually the consequence of another rank's end: give rank 0 the time to find it before
            # this rank accuses itself.
            if _from_peer(error):
                self._store.set("suspect", "")
                self._judged.wait(_SUSPECTED_S + 3 * self._every)
            if not self._judged.is_set():
                where = f"in phase {phase.phase_of(error)} after step {phase.now.step}"
                said = "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]
                self._store.claim("verdict", f"rank {self._rank} failed {where}: {said}")
        return self._verdict or None

    def _talk(self) -> None:
        """First thread: write the heartbeat and read the verdict, until the job ends or the store is gone."""
        number = 0
        while not self._leaving.is_set() and not self._judged.is_set():
            try:
                self._store.set(f"beat-{self._rank}", self._beat(number))
                self._watch()
            except dist.DistError:
                if not self._leaving.is_set():
                    self._end(f"the job's store is gone: rank 0 has ended, or its host{_seen(self._beats)}")
                return
            number, self._talked = number + 1, time.monotonic()
            self._leaving.wait(self._every)

    def _beat(self, number: int) -> Beat:
        """Return the current heartbeat of this rank."""
        collective, place = self._origin or phase.locate()
        now = phase.now
        return Beat(
            n=number,
            host=f"{socket.gethostname()}, process {os.getpid()}",
            step=now.step,
            phase=now.phase,
            age=time.monotonic() - now.since,
            marks=now.marks,
            collective=collective,
            at=place,
        )

    def _watch(self) -> None:
        """Read the heartbeats this rank is responsible for (rank 0: all; others: rank 0's) and the verdict."""
        others = [f"beat-{other}" for other in (range(self._size) if self._rank == 0 else (0,))]
        now = time.monotonic()
        # multi_get blocks on a key that does not exist, so until all ranks have written, keys are checked one by one.
        if len(self._beats) < len(others):
            absent = set(self._store.absent(others))
            others = [key for key in others if key not in absent]
        for key, value in self._store.get_many(others).items():
            other, beat = int(key.rpartition("-")[2]), read_beat(value)
            if beat and (other not in self._beats or self._beats[other]["n"] < beat["n"]):
                self._heard[other], self._beats[other] = now, beat
        suspected = self._rank == 0 and self._store.get("suspect") is not None
        patience = min(_SUSPECTED_S, self._run.heartbeat_timeout) if suspected else self._run.heartbeat_timeout
        # By this rank's clock alone: clocks of hosts differ.
        silence = {other: now - heard for other, heard in self._heard.items()}
        found = judge(self._beats, silence, patience, self._run.timeout if self._rank == 0 else math.inf)
        if found:
            self._store.claim("verdict", found)
        if (verdict := self._store.get("verdict")) is not None:
            self._end(printable(str(verdict), keep="\n"))

    def _keep_time(self) -> None:
        """Second thread: end this process when the store does not answer.

        If this thread itself did not run for a while (a suspended machine, SIGSTOP), all timers are reset: the silence
        of the others was this process's own.
        """
        before = time.monotonic()
        while not self._leaving.wait(self._every / 2):
            now = time.monotonic()
            gap, before = now - before, now
            if gap > self._run.heartbeat_timeout / 2:
                phase.now.since += gap
                self._talked = now
                self._heard = dict.fromkeys(self._heard, now)
            silence = now - self._talked
            if silence > self._run.heartbeat_timeout + 2 * self._every and not self._judged.is_set():
                self._end(
                    f"the job's store has not answered for {silence:.0f} s: rank 0 hangs, or its host"
                    f"{_seen(self._beats)}"
                )
                return

    def _end(self, verdict: str) -> None:
        """Let the main thread end with `verdict` if it can; otherwise end the process."""
        self._verdict = verdict
        self._judged.set()
        if self._leaving.wait(_FAREWELL_S / 2) or self._explaining.is_set():
            return
        collective, place = phase.locate()
        waits = f"in {collective} " if collective else ""
        print(f"{STOP_PREFIX}{verdict}\n  rank {self._rank} was {waits}at {place}", file=sys.stderr, flush=True)
        # Not sys.exit: the main thread is stuck in native code and would never see the exception.
        os._exit(RankLost.code)


def _from_peer(error: Exception) -> bool:
    """Whether an error may be the local symptom of another rank's end: by type, or by the words of gloo and NCCL."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))


def _seen(beats: dict[int, Beat]) -> str:
    """Return where rank 0 was seen last."""
    beat = beats.get(0)
    return f" (rank 0 on {beat['host']}, last seen in phase {beat['phase']} after step {beat['step']})" if beat else ""
