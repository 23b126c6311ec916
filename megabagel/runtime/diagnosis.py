"""Diagnosis of a job from the heartbeats of all ranks: which rank is dead, stopped or hanging."""

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from megabagel.errors import printable

_NAMED = 4
"""Number of ranks that a message describes one by one."""


class Beat(TypedDict):
    """Heartbeat of a rank: its position in the run."""

    n: int
    """Number of the heartbeat; a later one is higher."""
    host: str
    step: int
    """Finished steps."""
    phase: str
    age: float
    """Seconds since the phase began."""
    marks: int
    """Number of phases entered so far."""
    collective: str | None
    """Collective that its main thread waits in, or None."""
    at: str
    """Line of this package that its main thread executes."""


_KINDS = {"n": int, "host": str, "step": int, "phase": str, "age": float, "marks": int, "collective": str, "at": str}


def read_beat(value: Any) -> Beat | None:
    """Return a heartbeat from the store with its texts escaped for printing; None for anything else."""
    if not isinstance(value, dict) or value.keys() != _KINDS.keys():
        return None
    for name, kind in _KINDS.items():
        if type(value[name]) is not kind and not (name == "collective" and value[name] is None):
            return None
    if not math.isfinite(value["age"]):
        return None
    return Beat(**{name: printable(x) if isinstance(x, str) else x for name, x in value.items()})  # type: ignore[typeddict-item]


def judge(beats: Mapping[int, Beat], silence: Mapping[int, float], patience: float, timeout: float) -> str | None:
    """Return the message that ends the job, or None while every rank makes progress.

    A silent rank is blamed first. Otherwise, when a phase lasts longer than `timeout`, the rank outside any collective
    is blamed: the others wait for it. If all are in one, or none is seen to be, it is the rank with the least progress.

    Args:
        beats: newest heartbeat of each rank.
        silence: seconds since a new heartbeat of each rank arrived.
        patience: longest silence, seconds.
        timeout: longest phase, seconds.
    """
    silent = [rank for rank, seconds in silence.items() if seconds > patience]
    if silent:
        longest = max(silence[rank] for rank in silent)
        told = [f"{_who(rank, beats)} is dead or stopped, last seen {_where(beats[rank])}" for rank in silent]
        others = [rank for rank in beats if rank not in silent]
        return f"no sign of life for {longest:.0f} s: {_listed(told)}{_meanwhile(others, beats)}"
    if not any(beat["age"] > timeout for beat in beats.values()):
        return None
    # Half the limit, because the phases of ranks that wait for the same one began at different times.
    slow = [rank for rank, beat in beats.items() if beat["age"] > timeout / 2]
    busy = [rank for rank in slow if beats[rank]["collective"] is None]
    least = min((beats[rank]["step"], beats[rank]["marks"]) for rank in slow)
    behind = [rank for rank in slow if (beats[rank]["step"], beats[rank]["marks"]) == least]
    # On a GPU a collective returns at once and the rank waits for the device elsewhere, so that all ranks may look
    # busy: then the number of phases decides.
    blamed = busy if 0 < len(busy) < len(slow) else behind
    told = [f"{_who(rank, beats)} hangs {_where(beats[rank])}" for rank in blamed]
    others = [rank for rank in slow if rank not in blamed]
    return f"no progress within run.timeout={timeout:g} s: {_listed(told)}{_meanwhile(others, beats)}"


def _meanwhile(ranks: list[int], beats: Mapping[int, Beat]) -> str:
    """Return the part of the message about the ranks that are not blamed."""
    told = [f"rank {rank} waits {_where(beats[rank])}" for rank in ranks]
    return f". Meanwhile {_listed(told)}" if told else ""


def _listed(parts: list[str]) -> str:
    """Join parts of a message, at most `_NAMED` of them."""
    more = [f"and {len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return "; ".join(parts[:_NAMED] + more)


def _who(rank: int, beats: Mapping[int, Beat]) -> str:
    """Return rank and host."""
    return f"rank {rank} ({beats[rank]['host']})"


def _where(beat: Beat) -> str:
    """Return phase, step, collective and line of a heartbeat."""
    inside = f", in {beat['collective']}" if beat["collective"] else ""
    return f"in phase {beat['phase']} after step {beat['step']}{inside} at {beat['at']}"
