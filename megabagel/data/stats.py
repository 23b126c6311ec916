"""`megabagel data stats`: token, sample and image counts of the steps of a config.

Counted on the global plan, so no image is decoded and no model is built.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from megabagel.config.schema import Config
from megabagel.data.documents import ImageItem
from megabagel.data.plan.augmentation import shown_items
from megabagel.data.plan.global_plan import GlobalPlan, Source, StepPlan
from megabagel.sequence.sizes import Size


@dataclass
class Tokens:
    """Token counts by type.

    `text` counts text tokens without loss and the delimiters of images; `text_loss` counts rows with cross-entropy.
    """

    text: int = 0
    text_loss: int = 0
    vit: int = 0
    clean_latents: int = 0
    noised_latents: int = 0

    def add(self, size: Size) -> None:
        """Add the tokens of one sample."""
        self.text += size.tokens - size.tokens_gen - size.patches - size.ce_tokens
        self.text_loss += size.ce_tokens
        self.vit += size.patches
        self.clean_latents += size.tokens_gen - size.mse_tokens
        self.noised_latents += size.mse_tokens

    @property
    def total(self) -> int:
        """All tokens."""
        return self.text + self.text_loss + self.vit + self.clean_latents + self.noised_latents


@dataclass
class SourceStats:
    """Counts of one source.

    `epochs`: passes over the source; samples that wait in the packing window count as drawn. `left_out`: samples that
    were drawn but could not enter a pack, by reason. `skipped`: samples that the index refused, by reason.
    """

    task: str
    available: int
    samples: int = 0
    images: int = 0
    tokens: Tokens = field(default_factory=Tokens)
    epochs: float = 0.0
    left_out: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Stats:
    """Counts over a number of steps. `fills`: tokens of every pack as a fraction of `data.max_tokens`."""

    steps: int
    sources: dict[str, SourceStats]
    fills: tuple[float, ...]

    @property
    def tokens(self) -> Tokens:
        """Tokens of all sources."""
        rows = [asdict(source.tokens) for source in self.sources.values()]
        return Tokens(**{kind: sum(row[kind] for row in rows) for kind in rows[0]})

    @property
    def und_per_gen(self) -> float | None:
        """Tokens of the understanding expert per token of the generation expert; None if the latter has none."""
        tokens = self.tokens
        gen = tokens.clean_latents + tokens.noised_latents
        return (tokens.total - gen) / gen if gen else None

    def as_json(self) -> str:
        """All counts as a JSON document."""
        fills = {"mean": sum(self.fills) / len(self.fills), "least": min(self.fills), "most": max(self.fills)}
        counts = {"steps": self.steps, "packs": len(self.fills), "fill": fills, "und_per_gen": self.und_per_gen}
        sources = {name: asdict(source) for name, source in self.sources.items()}
        return json.dumps({**counts, "tokens": asdict(self.tokens), "sources": sources}, indent=2)

    def __str__(self) -> str:
        return "\n".join([*_table(self), "", *_notes(self)])


def count_steps(config: Config, sources: Sequence[Source], steps: int) -> Stats:
    """Plan `steps` steps from the beginning of the run and count what they hold."""
    plan = GlobalPlan(sources, config)
    found = {source.name: _empty(source) for source in sources}
    fills: list[float] = []
    for _ in range(steps):
        step = plan.next_step()
        _count(plan, step, found)
        fills += [pack.size.tokens / config.data.max_tokens for pack in step.packs]
    for name, epochs in plan.epochs().items():
        found[name].epochs = epochs
        prefix = f"{name}: "
        left_out = {reason.removeprefix(prefix): n for reason, n in step.skipped.items() if reason.startswith(prefix)}
        found[name].left_out = left_out
    return Stats(steps, found, tuple(fills))


def _empty(source: Source) -> SourceStats:
    skipped = Counter(skip.reason for skip in source.index.skipped)
    return SourceStats(source.task, len(source.index.documents), skipped=dict(skipped.most_common()))


def _count(plan: GlobalPlan, step: StepPlan, found: dict[str, SourceStats]) -> None:
    for visit in (visit for pack in step.packs for visit in pack.visits):
        source = found[visit.key.source]
        shown = shown_items(plan.document(visit.key), visit.key)
        source.samples += 1
        source.images += sum(isinstance(item, ImageItem) for _, item in shown)
        source.tokens.add(visit.size)


def _table(stats: Stats) -> list[str]:
    """One line per source and a total, as an aligned table."""
    counted = ("samples", "images", "text", "with loss", "ViT", "clean", "noised", "tokens")
    header: tuple[str, ...] = ("source", "task", *counted, "share", "epochs")
    total = stats.tokens.total
    lines = [header]
    for name, source in stats.sources.items():
        counts = (source.samples, source.images, *asdict(source.tokens).values(), source.tokens.total)
        share = f"{source.tokens.total / total:.1%}"
        lines.append((name, source.task, *(f"{count:,}" for count in counts), share, f"{source.epochs:.2f}"))
    samples, images = (sum(getattr(s, field) for s in stats.sources.values()) for field in ("samples", "images"))
    counts = (samples, images, *asdict(stats.tokens).values(), total)
    lines.append(("all", "", *(f"{count:,}" for count in counts), "100%", ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    flush = (str.ljust, str.ljust, *(str.rjust for _ in header[2:]))
    cells = ([put(cell, width) for put, cell, width in zip(flush, line, widths, strict=True)] for line in lines)
    return ["  ".join(line).rstrip() for line in cells]


def _notes(stats: Stats) -> list[str]:
    fills, ratio = stats.fills, stats.und_per_gen
    mean = sum(fills) / len(fills)
    lines = [
        f"{stats.steps} steps, {len(fills)} packs, filled to {mean:.1%} ({min(fills):.1%} to {max(fills):.1%})",
        "und : gen tokens = " + ("all und" if ratio is None else f"{ratio:.2f} : 1"),
    ]
    for name, source in stats.sources.items():
        lines += [f"{name}: {count} drawn and left out, {reason}" for reason, count in source.left_out.items()]
        lines += [f"{name}: {count} skipped by the index, {reason}" for reason, count in source.skipped.items()]
    return lines
