"""Keyed random numbers: every draw is a function of its labels, not of the rank or of earlier draws.

Labels are (seed, source, sample, epoch, purpose, ...). A sample has the same dropout, timestep and noise on any grid,
after any restart and with any number of loader workers; a sequential generator per rank would depend on all three.
"""

import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np


def _digest(*labels: int | str) -> bytes:
    """Return 128 bits that depend on every label and its type."""
    # The separator keeps ("ab", "c") apart from ("a", "bc"); the type name keeps 1 apart from "1".
    text = "\x1f".join([f"{type(label).__name__}:{label}" for label in labels])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def generator(*labels: int | str) -> np.random.Generator:
    """Return the Philox generator that belongs to these labels."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(*labels), "little")))


def uniform(*labels: int | str) -> float:
    """Return `generator(*labels).random()`, bit for bit, in a tenth of the time."""
    digest = _digest(*labels)
    # Assigning the state also resets counter and buffer of the bit generator, so this is its first output. The last
    # line is NumPy's own conversion to a double: the upper 53 of 64 bits.
    _keyed.state["state"]["key"] = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    _keyed.bits.state = _keyed.state
    return (_keyed.bits.random_raw() >> 11) * 2.0**-53


class _Keyed(threading.local):
    """One reusable Philox per thread, set to one key after another: constructing one takes ten times as long."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.state: Any = self.bits.state


_keyed = _Keyed()


def seed64(*labels: int | str) -> int:
    """Return the 64-bit seed that belongs to these labels; signed, so that it fits a torch int64 tensor."""
    return int.from_bytes(_digest(*labels)[:8], "little", signed=True)


@dataclass(frozen=True)
class SampleKey:
    """Labels of one use of one sample in a run."""

    seed: int
    """`train.seed` in training; 0 for prompts and golden cases."""
    source: str
    """Name of the data source."""
    sample: int
    """Index of the sample in its source."""
    epoch: int
    """Number of passes through the source before this one."""

    def generator(self, purpose: str, *index: int) -> np.random.Generator:
        """Return the generator for one purpose, for example ("timestep", item number)."""
        return generator(self.seed, self.source, self.sample, self.epoch, purpose, *index)

    def uniform(self, purpose: str, *index: int) -> float:
        """Return the first number in [0, 1) of the generator for one purpose."""
        return uniform(self.seed, self.source, self.sample, self.epoch, purpose, *index)

    def seed64(self, purpose: str, *index: int) -> int:
        """Return the 64-bit seed for one purpose."""
        return seed64(self.seed, self.source, self.sample, self.epoch, purpose, *index)
