"""Text of a sample: a table with one line per segment. The cells are also used by the PNG and HTML pages."""

from megabagel.data.inspect.view import ImageView, SampleView, SegmentView, TextView
from megabagel.sequence.items import Clip, Text
from megabagel.sequence.sample import LATENT, VIT

HEADER = ("#", "split", "item", "grid", "mode", "tokens", "loss", "RoPE", "noise group", "draw", "dropout")
NUMERIC = frozenset(("#", "tokens", "loss", "draw"))
"""Right-aligned columns."""
PRINTED = 80
"""Most tokens of a text that are printed."""


def heading(view: SampleView) -> str:
    """Identity of the sample: key, source, task and number."""
    return f"{view.name}   source {view.key.source}, task {view.task}, sample {view.key.sample} of {view.of}"


def summary(view: SampleView) -> str:
    """Token counts by type, loss rows, share of visible pairs, seed and epoch."""
    pack = view.pack
    vit, latent = (int((pack.kind_S == kind).sum()) for kind in (VIT, LATENT))
    text = pack.tokens - vit - latent
    share = pack.visible_S.sum() / pack.tokens**2
    return (
        f"{pack.tokens} tokens: {text} text and delimiters, {vit} ViT, {latent - pack.mse_tokens} clean and "
        f"{pack.mse_tokens} noised latents. Loss: {pack.ce_tokens} cross-entropy, {pack.mse_tokens} flow. "
        f"The mask lets {share:.0%} of all pairs through. Seed {view.key.seed}, epoch {view.key.epoch}."
    )


def cells(number: int, segment: SegmentView) -> tuple[str, ...]:
    """Cells of one segment, in the order of HEADER."""
    slots = segment.slots
    place = f"{slots[0]}" if len(slots) == 1 else f"{slots[0]}-{slots[-1]}"
    chance = f"{segment.probability:g}" if segment.probability else ""
    if segment.dropped:
        return (str(number), segment.kind.value, place, _grid(segment), "", "0", "", "", "", "", f"dropped ({chance})")
    first, last = segment.rope
    draw = "" if segment.timestep is None else f"{segment.timestep:+.2f}"
    rope = str(first) if first == last else f"{first}-{last}"
    loss = str(segment.loss) if segment.loss else ""
    counts = (segment.mode, str(segment.tokens), loss, rope, segment.group, draw, f"kept ({chance})" if chance else "")
    return (str(number), segment.kind.value, place, _grid(segment), *counts)


def as_text(view: SampleView) -> str:
    """The whole sample as text for a terminal."""
    lines = [HEADER, *(cells(number, segment) for number, segment in enumerate(view.segments))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(_flush(*cell) for cell in zip(HEADER, line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([heading(view), summary(view), "", *table, "", *map(_content, view.contents)])


def _grid(segment: SegmentView) -> str:
    item = segment.item
    if isinstance(item, Text):
        return ""
    frame = item.frames[0] if isinstance(item, Clip) else item
    times = f"{len(item.frames)} x " if isinstance(item, Clip) else ""
    return f"{times}{frame.rows} x {frame.cols}"


def _flush(column: str, cell: str, width: int) -> str:
    return cell.rjust(width) if column in NUMERIC else cell.ljust(width)


def _content(content: TextView | ImageView) -> str:
    if isinstance(content, TextView):
        rest = len(content.tokens) - PRINTED
        text = "|".join(content.tokens[:PRINTED]) + (f"| and {rest} more" if rest > 0 else "")
        return f"item {content.slot} ({content.role}), {len(content.tokens)} ids: {text!r}"
    height, width = content.size
    views = ", ".join(
        f"{branch.name} {branch.pixels.shape[0]} x {branch.pixels.shape[1]}" for branch in content.branches
    )
    return f"item {content.slot} ({content.role}), image of {height} x {width} pixels (height x width): {views}"
