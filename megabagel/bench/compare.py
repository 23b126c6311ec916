"""Two results of `megabagel bench` side by side, as ratios."""

from collections.abc import Sequence

from megabagel.bench.report import Measurement
from megabagel.checkpoint.manifest import leaves
from megabagel.errors import UserError

_RATIOS = (
    ("tokens/s per rank", lambda m: m.tokens_per_s),
    ("TFLOP/s per rank, masked", lambda m: m.tflops("masked")),
    ("step, s", lambda m: m.seconds),
    ("memory, peak", lambda m: max(m.memory_peak)),
    ("padding", lambda m: m.padding),
    ("imbalance, measured", lambda m: m.imbalance),
)


def compare(a: Sequence[Measurement], b: Sequence[Measurement]) -> str:
    """Lines with A, B and B / A for every grid that both measured, then what differs in their configs.

    Raises UserError when they have no grid in common.
    """
    theirs = {m.name: m for m in b}
    both = [(m, theirs[m.name]) for m in a if m.name in theirs]
    if not both and len(a) == len(b) == 1:
        both = [(a[0], b[0])]
    if not both:
        names = [", ".join(m.name for m in side) for side in (a, b)]
        raise UserError(f"bench compare: A has {names[0]}, B has {names[1]}: expected a grid that both have measured")
    lines = []
    for mine, other in both:
        lines.append(mine.name if mine.name == other.name else f"{mine.name} -> {other.name}")
        for label, value in _RATIOS:
            old, new = value(mine), value(other)
            ratio = f"{new / old:.3f}" if old else "-"
            lines.append(f"  {label:26} {old:>14,.4g} {new:>14,.4g}   x {ratio}")
        lines += [f"  {line}" for line in _differences(mine, other)]
    return "\n".join(lines)


def _differences(a: Measurement, b: Measurement) -> list[str]:
    """Other differences: settings, versions, commit and device."""
    facts = [
        {**leaves(m.config), **m.versions, "commit": m.commit, "device": m.device, "batches": m.batches} for m in (a, b)
    ]
    keys = [key for key in facts[0] | facts[1] if facts[0].get(key) != facts[1].get(key)]
    return [f"{key}: {facts[0].get(key)} -> {facts[1].get(key)}" for key in keys]
