"""Choosing which samples form a pack, and which packs a data-parallel rank gets. Pure functions of sizes."""

from collections.abc import Sequence

import numpy as np


def choose_pack(tokens: Sequence[int], min_tokens: int, max_tokens: int) -> list[int]:
    """Indices of the window's samples that form the next pack, oldest first.

    The oldest sample is always taken, then every further one that fits, until `min_tokens` are reached: none starves
    and none is lost, unlike the released packer (docs/bagel.md#packing). Every sample must fit by itself
    (tokens <= max_tokens). The pack holds fewer than `min_tokens` only if the window has nothing that fits.
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
    """Deal items to bins of equal count, heaviest first to the lightest bin that has room.

    `capacity` (default: items / bins, which must divide) is the number of items per bin. Each bin lists its items in
    the given order. Deterministic: ties go to the earlier item and the lower bin.
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
    """Packs for `ranks` (which divides their number) to run at the same time, turn by turn: [turn][rank].

    Packs of like load share a turn, so that few wait for others inside it. Within a turn the heaviest goes to the rank
    with the least so far, so that ranks finish a step together; for two turns that is the best there is. Turns follow
    one another by their first pack: a single rank runs all packs in the order given. Deterministic: ties go to the
    earlier pack and the lower rank.
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
