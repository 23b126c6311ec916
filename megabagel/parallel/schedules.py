"""Pipeline schedules as data: the order of forward and backward passes on a pipeline rank, as megatron-core runs them.

Training does not execute these lists; megatron-core's schedule functions decide as they run. The planner counts live
activations from them, and tests compare them with the order that megatron-core really ran.

F3.0 below: forward of micro-batch 3 through model chunk 0 of this rank.

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
    """Return the passes that a pipeline rank runs in one step, in order.

    Args:
        rank: index in the pipeline, 0 to pp - 1.
        pp: pipeline-parallel size; 1: no pipeline.
        vpp: model chunks per rank; chunk c of a rank is virtual stage c * pp + rank.
        micro_batches: number in the step; a multiple of `pp` if vpp > 1, as megatron-core requires.
    """
    return one_f_one_b(rank, pp, micro_batches) if vpp == 1 else interleaved_1f1b(rank, pp, vpp, micro_batches)


def one_f_one_b(rank: int, pp: int, micro_batches: int) -> list[Action]:
    """Return the 1F1B schedule of a rank.

    PipeDream-Flush; Narayanan et al., Efficient Large-Scale Language Model Training, section 2.2.1.
    """
    order = [(0, micro_batch) for micro_batch in range(micro_batches)]
    return _warmup_steady_cooldown(order, order, warmup=pp - rank - 1)


def interleaved_1f1b(rank: int, pp: int, vpp: int, micro_batches: int) -> list[Action]:
    """Return the interleaved 1F1B schedule of a rank (the same paper, section 2.2.2).

    Micro-batches pass in groups of `pp` through one model chunk after the other: megatron-core's default for
    `microbatch_group_size_per_vp_stage`, which this project does not change.

    Args:
        rank: index in the pipeline.
        pp: pipeline-parallel size.
        vpp: model chunks per rank.
        micro_batches: number in the step, a multiple of `pp`.
    """
    assert micro_batches % pp == 0, "megatron-core refuses other counts"
    groups = [range(start, start + pp) for start in range(0, micro_batches, pp)]
    forward = [(chunk, micro_batch) for group in groups for chunk in range(vpp) for micro_batch in group]
    backward = [(vpp - 1 - chunk, micro_batch) for chunk, micro_batch in forward]
    return _warmup_steady_cooldown(forward, backward, warmup=2 * (pp - rank - 1) + (vpp - 1) * pp)


def _warmup_steady_cooldown(
    forward: list[tuple[int, int]], backward: list[tuple[int, int]], warmup: int
) -> list[Action]:
    """Return `warmup` forwards, then forwards and backwards in turn, then the remaining backwards.

    forward, backward: (model chunk, micro-batch) in the order of the passes.
    """
    ahead = [Action("F", *turn) for turn in forward[:warmup]]
    turns = zip(forward[warmup:], backward, strict=False)
    steady = [action for f, b in turns for action in (Action("F", *f), Action("B", *b))]
    done = max(len(forward) - warmup, 0)
    return ahead + steady + [Action("B", *turn) for turn in backward[done:]]


def peak_in_flight(actions: Iterable[Action], vpp: int) -> list[int]:
    """Return, per model chunk, the micro-batches with live activations when most are live over all chunks.

    Args:
        actions: passes of one rank, in order.
        vpp: model chunks per rank.
    """
    alive, most = [0] * vpp, [0] * vpp
    for action in actions:
        alive[action.chunk] += 1 if action.kind == "F" else -1
        if sum(alive) > sum(most):
            most = list(alive)
    return most
