"""Fuzzing of everything that is read from outside: seeded inputs, a process that reads them, and a watch over it.

    python -m tests.support.fuzz --count 500                reads 500 inputs of each target and prints the table
    python -m tests.support.fuzz --count 500 --write        also writes it into docs/faults.md
    python -m tests.support.fuzz --only yaml --number 17    reads one input here, with its traceback

Every input follows from (seed, target, number) alone, so a number of a report is a reproduction. Inputs are read by a
process of their own: one that crashes or hangs costs its input, and the rest go on in a new one. Targets are in
fuzz_targets.py. The outcomes:

    read       the input was taken, and what was made of it passed the target's own check
    left out   samples were left out by name
    refused    one message of the program (UserError)
    wrong      taken, but the target's check failed
    crash      any other exception, or the end of the process
    hang       more than SECONDS of the process's time
    memory     more than MEMORY beyond what the process had
"""

import argparse
import contextlib
import copy
import json
import logging
import os
import random
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 5.0
"""Most processor seconds for one input."""
PATIENCE = 60
"""Wall time is bounded by this many times as much: an answer may be late on a busy machine."""
START_UP = 600.0
"""Most seconds until the reading process is ready."""
MEMORY = 512 << 20
"""Most bytes for one input."""
ADDRESS_SPACE = 16 << 30
"""Of the reading process, so that a fault cannot take the machine's memory. Libraries reserve some gigabytes."""
GOOD, BAD = ("read", "left out", "refused"), ("wrong", "crash", "hang", "memory")
DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
TARGETS = "tests.support.fuzz_targets"
START, END = "<!-- fuzz -->\n", "<!-- /fuzz -->\n"


class Wrong(AssertionError):
    """An input was taken, and the target's own check failed."""


class Outcome(NamedTuple):
    """What became of an input."""

    target: str
    number: int
    kind: str
    seconds: float
    bytes: int
    told: str
    """Message or traceback."""


@dataclass
class Row:
    """Outcomes of one target."""

    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bytes: int = 0
    faults: list[Outcome] = field(default_factory=list)

    def add(self, found: Outcome) -> None:
        """Add the outcome of an input."""
        self.counts[found.kind] += 1
        self.seconds, self.bytes = max(self.seconds, found.seconds), max(self.bytes, found.bytes)
        if found.kind in BAD:
            self.faults.append(found)


def fuzz(
    count: int, seed: int = 0, only: Sequence[str] = (), module: str = TARGETS, seconds: float = SECONDS
) -> dict[str, Row]:
    """Read `count` inputs of every target (or of `only` these); returns the outcomes by target.

    module: has the targets, a mapping TARGETS. seconds: most processor seconds for one input.
    """
    with tempfile.TemporaryDirectory() as folder:
        reader = _Reader(module, seed, Path(folder), seconds)
        try:
            names = list(only) or reader.names()
            rows = {name: Row() for name in names}
            for name in names:
                for number in range(count):
                    rows[name].add(reader.read(name, number))
        finally:
            reader.end()
    return rows


class _Reader:
    """The process that reads inputs; started when it is needed."""

    def __init__(self, module: str, seed: int, folder: Path, seconds: float) -> None:
        self._seconds = seconds
        # Not by -m: targets import this file, and it would be there twice, with two classes Wrong.
        self._command = [sys.executable, "-c", "from tests.support import fuzz; fuzz.main()", "--serve"]
        self._command += ["--module", module, "--seed", str(seed), "--folder", str(folder)]
        self._command += ["--seconds", str(seconds)]
        self._process: subprocess.Popen[bytes] | None = None

    def names(self) -> list[str]:
        """Names of all targets."""
        return list(self._ask({"names": True})["names"])

    def read(self, target: str, number: int) -> Outcome:
        """Have one input read."""
        try:
            return Outcome(**self._ask({"target": target, "number": number}))
        except TimeoutError:
            self.end()
            return Outcome(target, number, "hang", 0.0, 0, "no answer")
        except EOFError:
            assert self._process is not None
            code = self._process.wait()
            self.end()
            return Outcome(target, number, "hang" if code == -24 else "crash", 0.0, 0, f"the process ended with {code}")

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        fresh = self._process is None
        if self._process is None:
            self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        process.stdin.flush()
        answer, deadline = b"", time.monotonic() + (START_UP if fresh else self._seconds * PATIENCE)
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise EOFError
            answer += piece
        return dict(json.loads(answer))


def _serve(module: str, seed: int, folder: Path, seconds: float) -> None:
    """Read the inputs that stdin asks for."""
    answers = os.fdopen(os.dup(1), "w")
    # What a reader or a library prints must not be taken for an answer.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    logging.disable(logging.CRITICAL)
    targets = _targets(module, folder)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for line in sys.stdin:
        question = json.loads(line)
        if "names" in question:
            told: Any = {"names": list(targets)}
        else:
            used = resource.getrusage(resource.RUSAGE_SELF)
            limit = int(used.ru_utime + used.ru_stime + seconds) + 1  # SIGXCPU, signal 24, ends the process there
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            told = _outcome(targets, question["target"], question["number"], seed, folder)._asdict()
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def _targets(module: str, folder: Path) -> Mapping[str, Any]:
    """The targets of a module, after their imports and common files, which no input shall pay for."""
    import importlib

    loaded = importlib.import_module(module)
    loaded.prepare(folder)
    return dict(loaded.TARGETS)


def _outcome(targets: Mapping[str, Any], name: str, number: int, seed: int, folder: Path) -> Outcome:
    """Read one input here."""
    from megabagel.data.documents import SampleError
    from megabagel.errors import UserError

    rng = random.Random(f"{seed}/{name}/{number}")
    before, started = _reset_peak(), time.process_time()
    told = ""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        try:
            kind = targets[name](rng, Path(own))
            assert kind in GOOD
        except UserError as error:
            kind, told = "refused", str(error)[:500]
        except SampleError as error:
            kind, told = "left out", str(error)[:500]
        except Wrong:
            kind, told = "wrong", traceback.format_exc()[-3000:]
        except BaseException:
            kind, told = "crash", traceback.format_exc()[-3000:]
    seconds, used = time.process_time() - started, _peak() - before
    if kind in GOOD and seconds > SECONDS:
        kind = "hang"
    if kind in GOOD and used > MEMORY:
        kind = "memory"
    return Outcome(name, number, kind, seconds, max(0, used), told)


def _reset_peak() -> int:
    """Set the peak of resident memory to what is resident now, and return it (Linux, proc(5): clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """Peak of resident bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


# Changes to bytes and JSON that targets use

WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63), 10**30),
    *(0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), float("-inf")),
    *("", " ", "1", "-1", "nan", "true", "null", "a" * 3000, "\0", "\ud800", "\x1b[31m", "../x", "/etc/passwd", "é"),
    *([], {}, [[]], [None], {"": 0}, {"a": {"b": {}}}, [0] * 300, ["x"] * 300),
)


DEEP = b"[" * 50_000 + b"]" * 50_000
"""JSON that no parser of recursive functions reads."""


def mutated_json(rng: random.Random, value: Any, times: int = 1) -> Any:
    """A copy of a JSON value with changes: entries replaced, removed, doubled, renamed, of another type."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        holders = list(_holders(value))
        if not holders:
            return copy.deepcopy(rng.choice(WEIRD))
        holder, key = rng.choice(holders)
        old = holder[key]
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(["", "x", f"{key} ", key.upper(), "__metadata__", "\ud800", "../" + key])] = old
            case 1:
                holder.insert(rng.randrange(len(holder) + 1), old)
            case 2 if isinstance(old, int | float) and not isinstance(old, bool):
                holder[key] = rng.choice([old + 1, old - 1, -old, old * 2**20, old + 0.5, str(old), [old]])
            case 2 | 3:
                other, there = rng.choice(holders)
                holder[key] = json.loads(json.dumps(other[there]))
            case 4:
                holder[key] = [old]
            case _:
                holder[key] = copy.deepcopy(rng.choice(WEIRD))  # not shared with the next input
    return value


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every entry."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _holders(value[key])


def as_json(rng: random.Random, value: Any) -> bytes:
    """JSON text; one in twenty is spoiled as text."""
    text = json.dumps(value).encode()
    return mutated_bytes(rng, text, 1) if rng.random() < 0.05 else text


def mutated_bytes(rng: random.Random, data: bytes, times: int = 1) -> bytes:
    """A copy of `data` with bits flipped, numbers overwritten, and slices removed, doubled, moved or cut off."""
    new = bytearray(data)
    for _ in range(times):
        size = len(new)
        at = rng.randrange(size + 1)
        length = min(size - at, 1 << rng.randrange(0, 10))
        match rng.randrange(8):
            case 0 if at < size:
                new[at] ^= 1 << rng.randrange(8)
            case 1 if at < size:
                new[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x20, 0x2D, 0x7B))
            case 2:
                width = rng.choice((2, 4, 8))
                number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, size)) % 2 ** (8 * width)
                new[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 3:
                del new[at : at + length]
            case 4:
                new[at:at] = new[at : at + length]
            case 5:
                new[at:at] = rng.randbytes(rng.randrange(1, 32))
            case 6:
                there = rng.randrange(size + 1)
                new[at : at + length] = new[there : there + length]
            case _ if rng.random() < 0.5:
                del new[at:]
    return bytes(new)


# Table


def table(rows: Mapping[str, Row]) -> str:
    """The outcomes as Markdown."""
    kinds = (*GOOD, *BAD)
    head = f"| input | inputs | {' | '.join(kinds)} | most s | most MiB |\n|{' --- |' * (len(kinds) + 4)}\n"
    lines = [
        f"| {name} | {row.counts.total():,} | {' | '.join(str(row.counts[kind]) for kind in kinds)} "
        f"| {row.seconds:.2f} | {row.bytes / 2**20:.0f} |\n"
        for name, row in rows.items()
    ]
    return head + "".join(lines)


def _write(text: str, rows: Mapping[str, Row]) -> str:
    """The document with the rows of these targets replaced; rows of others stay."""
    before, _, rest = text.partition(START)
    old, _, after = rest.partition(END)
    kept = {line.split(" | ")[0][2:]: line for line in old.splitlines(keepends=True)[2:]}
    head, *new = table(rows).splitlines(keepends=True)
    kept |= {line.split(" | ")[0][2:]: line for line in new[1:]}
    return before + START + head + new[0] + "".join(kept.values()) + END + after


def main() -> None:
    """Command line; see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="targets")
    parser.add_argument("--number", type=int, help="read this one input of each target here")
    parser.add_argument("--write", action="store_true", help="write the table into docs/faults.md")
    parser.add_argument("--module", default=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return _serve(args.module, args.seed, args.folder, args.seconds)
    if args.number is not None:
        with tempfile.TemporaryDirectory() as folder:
            targets = _targets(args.module, Path(folder))
            for name in args.only or targets:
                print(_outcome(targets, name, args.number, args.seed, Path(folder)))
        return None
    rows = fuzz(args.count, args.seed, args.only, args.module)
    print(table(rows))
    for fault in (fault for row in rows.values() for fault in row.faults):
        print(f"{fault.target} {fault.number}: {fault.kind}\n{fault.told}")
    if args.write:
        DOCUMENT.write_text(_write(DOCUMENT.read_text(), rows))
    return None


if __name__ == "__main__":
    main()
