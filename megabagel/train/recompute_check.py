"""Recomputation of one micro-batch: an arithmetic fault of a device, which raises no error, becomes visible.

Forward and backward are the same function of the same bits, so a second pass gives the same loss sums and gradients
(docs/kernels.md: no kernel of training adds in varying order). A difference is a fault of the device, its memory or a
kernel. Ranks that share a pack feed each other, so one faulty rank may make all of them differ.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megabagel.model.inputs import StageInputs
from megabagel.train.replicas import described, fingerprint, ranks_text
from megabagel.train.step import Counts, StepRunner


def recomputed_differently(
    runner: StepRunner, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]
) -> str | None:
    """Run the first micro-batch of a step twice; return a description of what differs, the same on every rank, or None.

    Collective. Costs two micro-batches (two rounds of them under an interleaved schedule, which takes no fewer) and
    leaves gradients behind that the step has to clear.

    Args:
        runner: of this rank.
        micro_batches: this rank's micro-batches of the step.
        counts: the denominators of each micro-batch.
    """
    few = slice(runner.fewest_micro_batches)
    first, second = (_bits(runner, micro_batches[few], counts[few]) for _ in range(2))
    odd = [name for name in first if first[name] != second[name]]
    if not odd:
        return described([])
    rank = dist.get_rank()
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return described([(f"a micro-batch computed twice on {ranks_text([rank])} differs in {odd[0]}{more}", [rank])])


def _bits(runner: StepRunner, micro_batches: Sequence[StageInputs], counts: Sequence[Counts]) -> dict[str, int]:
    """Return hashes of the loss sums and of this rank's own gradients, before any reduction over ranks."""
    sums = runner.unreduced(micro_batches, counts)
    found = {"the loss": fingerprint(torch.stack(sums))} if sums else {}
    for chunk in runner.optimizer.chunks:
        for name, parameter in chunk.module.model.named_parameters():
            if parameter.requires_grad:
                found[f"the gradient of {name}"] = fingerprint(parameter.main_grad)
    # One copy from the device instead of one per tensor.
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True)) if found else {}
