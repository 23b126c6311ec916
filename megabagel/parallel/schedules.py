"""Pipeline schedules as data: the order of forward and backward passes on a pipeline rank, as in megatron-core.

Nothing executes these lists: megatron-core's schedules are functions that decide as they go. The planner counts live
activations on them; tests compare them with what megatron-core really ran. An executor of our own would read them too.

F3.0 in the legend of a list: forward of micro-batch 3 through model chunk 0 of this rank.

    1F1B, rank 0 of 2:          F0.0 F1.0 B0.0 F2.0 B1.0 F3.0 B2.0 B3.0
    rank 1:                     F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple


class Action(NamedTuple):
    """One pass of one micro-batch through one model chunk of a rank."""

    kind: Literal["F", "B"]
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"


def schedule(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """What pipeline rank `rank` runs in one step, in order.

    Args:
        rank: this rank's place in the pipeline, 0 to pp - 1.
        pp: pipeline ranks; 1 stands for no pipeline at all.
        vpp: model chunks per rank. Virtual stage chunk * pp + rank holds the layers of a chunk.
        micro_batches: of the step; a multiple of `pp` where vpp > 1, as megatron-core requires.
    """
    return one_f_one_b(rank, pp, micro_batches) if vpp == 1 else interleaved_1f1b(rank, pp, vpp, micro_batches)


def one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """1F1B (PipeDream-Flush; Narayanan et al., Efficient Large-Scale Language Model Training, section 2.2.1)."""
    order = [(0, micro_batch) for micro_batch in range(micro_batches)]
    return _warmup_steady_cooldown(order, order, warmup=pp - rank - 1)


def interleaved_1f1b(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """Interleaved 1F1B (the same paper, section 2.2.2).

    Micro-batches go in groups of `pp` through one chunk after the other; megatron-core's
    `microbatch_group_size_per_vp_stage`, which may be longer, is left at that.
    """
    assert micro_batches % pp == 0, "megatron-core refuses other counts"
    groups = [range(start, start + pp) for start in range(0, micro_batches, pp)]
    forward = [(chunk, micro_batch) for group in groups for chunk in range(vpp) for micro_batch in group]
    backward = [(vpp - 1 - chunk, micro_batch) for chunk, micro_batch in forward]
    return _warmup_steady_cooldown(forward, backward, warmup=2 * (pp - rank - 1) + (vpp - 1) * pp)


def _warmup_steady_cooldown(
    forward: list[tuple[int, int]], backward: list[tuple[int, int]], warmup: int
) -> list[Action]:
    """`warmup` forwards, then one forward and one backward in turn, then the backwards that are left."""
    ahead = [Action("F", *turn) for turn in forward[:warmup]]
    turns = zip(forward[warmup:], backward, strict=False)
    steady = [action for f, b in turns for action in (Action("F", *f), Action("B", *b))]
    done = max(len(forward) - warmup, 0)
    return ahead + steady + [Action("B", *turn) for turn in backward[done:]]


def peak_in_flight(actions: Iterable[Action], vpp: int) -> list[int]:
    """Micro-batches of each chunk that wait for their backward when most do, at the first such moment."""
    alive, most = [0] * vpp, [0] * vpp
    for action in actions:
        alive[action.chunk] += 1 if action.kind == "F" else -1
        if sum(alive) > sum(most):
            most = list(alive)
    return most
