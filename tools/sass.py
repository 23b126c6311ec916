"""What the machine code of one CUDA kernel says about it, from the text of `cuobjdump -sass`."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S+)\s*(.*?);", re.MULTILINE)
TARGET = re.compile(r"0x([0-9a-f]+)$")
WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")

SMALLEST_LOOP = 24
"""Instructions; anything smaller waits for a barrier."""

MATRIX = re.compile(r"^(HMMA|HGMMA|UTC\w*MMA)$")
LOCAL = re.compile(r"^(LDL|STL)$")


@dataclass(frozen=True)
class Instruction:
    """One line."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str

    @property
    def name(self) -> str:
        """The opcode alone: LDG."""
        return self.opcode.split(".")[0]


@dataclass(frozen=True)
class Loop:
    """How many instructions a loop has."""

    instructions: int
    matrix: int
    local: int
    """Loads and stores of local memory, which is where registers are spilled."""


class Code:
    """The instructions of one kernel."""

    def __init__(self, sass: str) -> None:
        self.instructions = [Instruction(int(at, 16), op, rest.strip()) for at, op, rest in INSTRUCTION.findall(sass)]
        self.names = Counter(i.name for i in self.instructions)

    def loops(self) -> list[Loop]:
        """The innermost loops in the order of the code."""
        ends = self._loop_ends()
        spans = [(a, b) for a, b in ends.items() if b - a >= SMALLEST_LOOP]
        innermost = [s for s in spans if not any(s[0] <= a and b <= s[1] and (a, b) != s for a, b in spans)]
        return [_loop(self.instructions[a : b + 1]) for a, b in sorted(innermost)]

    def _loop_ends(self) -> dict[int, int]:
        """Index of a loop's first instruction -> index of its last jump back.

        What follows the last EXIT are waits for barriers, moved out of the way. A kernel that cannot run is a trap
        without any EXIT.
        """
        index = {i.address: number for number, i in enumerate(self.instructions)}
        last_exit = max((number for number, i in enumerate(self.instructions) if i.name == "EXIT"), default=0)
        ends: dict[int, int] = {}
        for number, i in enumerate(self.instructions[:last_exit]):
            target = TARGET.search(i.operands) if i.name == "BRA" else None
            if target and int(target[1], 16) <= i.address:
                ends[index[int(target[1], 16)]] = number
        return ends

    def wide_share(self, name: str) -> float:
        """The part of the bytes of all LDG or STG that moves 16 or more at once; 0 if there are none."""
        sizes = [_bytes(i.opcode) for i in self.instructions if i.name == name]
        return round(sum(size for size in sizes if size >= 16) / max(1, sum(sizes)), 2)


def _loop(body: list[Instruction]) -> Loop:
    def count(matches: Callable[[str], object]) -> int:
        return sum(bool(matches(i.name)) for i in body)

    return Loop(len(body), count(MATRIX.match), count(LOCAL.match))


def _bytes(opcode: str) -> int:
    """What one thread moves: LDG.E.U16 2 bytes, LDG.E 4, LDG.E.128 16."""
    width = WIDTH.search(opcode)
    return int(width[1] or width[2]) // 8 if width else 4
