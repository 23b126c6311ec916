"""The picture of a report: throughput by grid, and below it where each step's time goes. Plain SVG, no library."""

from collections.abc import Sequence
from html import escape

from megabagel.bench.report import Measurement

WIDTH, LEFT, ROW, TOP = 760, 190, 26, 34
"""Pixels: of the picture, left of the bars, per bar, and above the first."""
COLOURS = (
    "#8c6bb1", "#4292c6", "#e377c2", "#17a2a2", "#2171b5", "#08519c", "#fd8d3c", "#d94801", "#41ab5d", "#bdbdbd",
)  # fmt: skip
"""One per phase, in the order of `phases.PHASES`."""


def draw(measurements: Sequence[Measurement]) -> str:
    """The picture as SVG text."""
    bars, at = _throughput(measurements)
    phases, height = _phases(measurements, at + 20)
    style = "text{font:12px sans-serif;fill:#333}.t{font-weight:bold}.n{text-anchor:end}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
    return "\n".join(
        [head, f"<style>{style}</style>", _box(0, 0, WIDTH, height, "#ffffff"), *bars, *phases, "</svg>\n"]
    )


def _throughput(measurements: Sequence[Measurement]) -> tuple[list[str], int]:
    """Bars of tokens per second and rank, and where they end."""
    most = max(m.tokens_per_s for m in measurements)
    room = WIDTH - LEFT - 150
    lines = [_text(10, 20, "tokens per second and rank", "t")]
    at = TOP
    for m in measurements:
        width = room * m.tokens_per_s / most
        lines += [
            _text(LEFT - 8, at + 15, m.name, "n"),
            _box(LEFT, at + 3, width, ROW - 8, "#2171b5"),
            _text(LEFT + width + 6, at + 15, f"{m.tokens_per_s:,.0f}, MFU {m.mfu('masked'):.0%}"),
        ]
        at += ROW
    return lines, at


def _phases(measurements: Sequence[Measurement], top: int) -> tuple[list[str], int]:
    """Stacked bars of seconds by phase, their legend, and where it ends."""
    most = max(sum(m.phases.values()) for m in measurements)
    room = WIDTH - LEFT - 60
    names = [name for name in measurements[0].phases if any(m.phases.get(name, 0) > 0.002 * most for m in measurements)]
    colour = dict(zip(measurements[0].phases, COLOURS, strict=False))
    lines = [_text(10, top, "seconds of a step by phase, mean over ranks", "t")]
    at = top + 14
    for m in measurements:
        lines.append(_text(LEFT - 8, at + 15, m.name, "n"))
        x = float(LEFT)
        for name in names:
            width = room * m.phases.get(name, 0) / most
            lines.append(_box(x, at + 3, width, ROW - 8, colour[name], f"{name}: {m.phases.get(name, 0):.3f} s"))
            x += width
        lines.append(_text(x + 6, at + 15, f"{sum(m.phases.values()):.3f}"))
        at += ROW
    for number, name in enumerate(names):
        x, y = LEFT + (number % 4) * 140, at + 8 + (number // 4) * 18
        lines += [_box(x, y, 11, 11, colour[name]), _text(x + 16, y + 10, name)]
    return lines, at + 8 + (len(names) + 3) // 4 * 18 + 10


def _box(x: float, y: float, width: float, height: float, colour: str, title: str = "") -> str:
    told = f"<title>{escape(title)}</title>" if title else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}">{told}</rect>'


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(words)}</text>'
