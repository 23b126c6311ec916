"""Selection of the samples of a pack, and assignment of packs to data-parallel ranks: pure functions of sizes."""

from collections.abc import Sequence

import numpy as np


def choose_pack(tokens: Sequence[int], min_tokens: int, max_tokens: int) -> list[int]:
    """Return the indices of the window's samples that form the next pack, oldest first.

    Takes the oldest sample, then every further one that fits, until `min_tokens` are reached (first fit). No sample is
    postponed for ever and none is lost, unlike in the released packer (docs/bagel.md#packing). The pack holds fewer
    than `min_tokens` only if nothing else in the window fits.

    Args:
        tokens: tokens of every sample in the window, oldest first; each at most `max_tokens`.
        min_tokens: the pack is closed once it holds as many.
        max_tokens: the pack never holds more.
    """
    chosen, total = [], 0
    for index, length in enumerate(tokens):
        if total + length <= max_tokens:
            chosen.append(index)
            total += length
            if total >= min_tokens:
                break
    return chosen


def deal(loads: Sequence[float], bins: int, capacity: int | None = None) -> list[list[int]]:
    """Assign items to bins, heaviest item first to the lightest bin that has room (longest processing time first).

    Deterministic, since every rank computes it for itself: ties go to the earlier item and the lower bin.

    Args:
        loads: weight of every item.
        bins: number of bins.
        capacity: most items per bin; default len(loads) / bins, which must be whole.

    Returns:
        Per bin the indices of its items, ascending.
    """
    capacity = len(loads) // bins if capacity is None else capacity
    assert capacity * bins >= len(loads), (len(loads), bins, capacity)
    content: list[list[int]] = [[] for _ in range(bins)]
    weight = [0.0] * bins
    for index in np.argsort(-np.asarray(loads, np.float64), kind="stable"):
        target = min((b for b in range(bins) if len(content[b]) < capacity), key=lambda b: (weight[b], b))
        content[target].append(int(index))
        weight[target] += float(loads[index])
    return [sorted(items) for items in content]


def turns(loads: Sequence[float], ranks: int) -> list[list[int]]:
    """Assign packs to data-parallel ranks, micro-batch by micro-batch.

    Packs of similar load form one turn, the micro-batches that all ranks run at the same time, because ranks may wait
    for each other inside it. Within a turn the heaviest pack goes to the rank with the least load so far, so that ranks
    finish the step together; for two turns that is optimal. Deterministic: ties go to the earlier pack and lower rank.

    Args:
        loads: estimated time of every pack; their number is a multiple of `ranks`.
        ranks: data-parallel size.

    Returns:
        Indices of packs, [turn][rank]. Turns are ordered by their lowest index, so a single rank runs the packs in the
        given order.
    """
    heaviest_first = np.argsort(-np.asarray(loads, np.float64), kind="stable").tolist()
    rank_loads, dealt = [0.0] * ranks, []
    for start in range(0, len(loads), ranks):
        turn = [0] * ranks
        lightest_first = sorted(range(ranks), key=rank_loads.__getitem__)
        for pack, rank in zip(heaviest_first[start : start + ranks], lightest_first, strict=True):
            turn[rank] = pack
            rank_loads[rank] += loads[pack]
        dealt.append(turn)
    return sorted(dealt, key=min)
