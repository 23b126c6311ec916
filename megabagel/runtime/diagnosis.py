"""Which rank is to blame, from the beats of all: a silent one, else the one that the others wait for."""

import math
from collections.abc import Mapping
from typing import Any, TypedDict

from megabagel.errors import printable

_NAMED = 4
"""Ranks that a message describes one by one."""


class Beat(TypedDict):
    """What a rank says about itself."""

    n: int
    """Counts the beats."""
    host: str
    step: int
    """Finished steps."""
    phase: str
    age: float
    """Seconds since the phase began."""
    marks: int
    """Phases so far."""
    collective: str | None
    """What its main thread waits in."""
    at: str
    """Line of ours that its main thread executes."""


_KINDS = {"n": int, "host": str, "step": int, "phase": str, "age": float, "marks": int, "collective": str, "at": str}


def read_beat(value: Any) -> Beat | None:
    """A beat as it came through the store, its texts fit to be printed; None for anything else."""
    if not isinstance(value, dict) or value.keys() != _KINDS.keys():
        return None
    for name, kind in _KINDS.items():
        if type(value[name]) is not kind and not (name == "collective" and value[name] is None):
            return None
    if not math.isfinite(value["age"]):
        return None
    return Beat(**{name: printable(x) if isinstance(x, str) else x for name, x in value.items()})  # type: ignore[typeddict-item]


def judge(beats: Mapping[int, Beat], silence: Mapping[int, float], patience: float, timeout: float) -> str | None:
    """The message that ends the job, or None while all is well.

    silence: seconds since a rank's beat was new. patience: how long that may be. timeout: how long a phase may last.
    """
    silent = [rank for rank, seconds in silence.items() if seconds > patience]
    if silent:
        longest = max(silence[rank] for rank in silent)
        told = [f"{_who(rank, beats)} is dead or stopped, last seen {_where(beats[rank])}" for rank in silent]
        others = [rank for rank in beats if rank not in silent]
        return f"no sign of life for {longest:.0f} s: {_listed(told)}{_meanwhile(others, beats)}"
    if not any(beat["age"] > timeout for beat in beats.values()):
        return None
    slow = [rank for rank, beat in beats.items() if beat["age"] > timeout / 2]
    busy = [rank for rank in slow if beats[rank]["collective"] is None]
    least = min((beats[rank]["step"], beats[rank]["marks"]) for rank in slow)
    behind = [rank for rank in slow if (beats[rank]["step"], beats[rank]["marks"]) == least]
    blamed = busy if 0 < len(busy) < len(slow) else behind  # on a GPU ranks may wait without a sign of it
    told = [f"{_who(rank, beats)} hangs {_where(beats[rank])}" for rank in blamed]
    others = [rank for rank in slow if rank not in blamed]
    return f"no progress within run.timeout={timeout:g} s: {_listed(told)}{_meanwhile(others, beats)}"


def _meanwhile(ranks: list[int], beats: Mapping[int, Beat]) -> str:
    """What the ranks do that are not to blame."""
    told = [f"rank {rank} waits {_where(beats[rank])}" for rank in ranks]
    return f". Meanwhile {_listed(told)}" if told else ""


def _listed(parts: list[str]) -> str:
    more = [f"and {len(parts) - _NAMED} more"] if len(parts) > _NAMED else []
    return "; ".join(parts[:_NAMED] + more)


def _who(rank: int, beats: Mapping[int, Beat]) -> str:
    return f"rank {rank} ({beats[rank]['host']})"


def _where(beat: Beat) -> str:
    inside = f", in {beat['collective']}" if beat["collective"] else ""
    return f"in phase {beat['phase']} after step {beat['step']}{inside} at {beat['at']}"
