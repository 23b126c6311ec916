"""Scale study by simulation: `python benchmarks/planner_scale.py`.

The planner's best grid for bagel_7b_pt.yaml from 8 to 16,384 H200: strong scaling keeps the recipe's 384 packs per
step, weak scaling gives every GPU 1.5 packs. Writes docs/images/planner_scale.svg and prints the table of
docs/planner.md.
"""

from dataclasses import replace
from pathlib import Path

from megabagel.config.load import load
from megabagel.config.schema import Config
from megabagel.runtime import cpu_backend

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "examples" / "configs" / "bagel_7b_pt.yaml"
GPUS = (8, 32, 128, 512, 2048, 8192, 16384)
Point = tuple[int, float, str]
"""GPUs, tokens/s/GPU, grid."""


def best_grids(config: Config, weak: bool) -> list[Point]:
    """The fastest grid that fits, by number of GPUs; numbers without one are left out."""
    from megabagel.errors import UserError
    from megabagel.planner.estimate import Planner
    from megabagel.planner.hardware import CATALOG
    from megabagel.planner.search import search

    points = []
    for gpus in GPUS:
        train = replace(config.train, packs_per_step=gpus * 3 // 2) if weak else config.train
        try:
            found = search(Planner(replace(config, train=train), CATALOG["h200"]), gpus, ("bf16",)).fitting
        except UserError:
            found = []
        if found:
            points.append((gpus, found[0].tokens_per_second, str(found[0].case.grid)))
    return points


def chart(curves: dict[str, list[Point]]) -> str:
    """An SVG of tokens/s/GPU over GPUs (logarithmic), a line per curve."""
    width, height, left, bottom = 720, 380, 70, 330
    top = max(speed for curve in curves.values() for _, speed, _ in curve) * 1.1
    colours = ("#2563a8", "#b8541a")

    def x(gpus: int) -> float:
        return left + (gpus.bit_length() - 4) / (GPUS[-1].bit_length() - 4) * (width - left - 30)

    def y(speed: float) -> float:
        return bottom - speed / top * (bottom - 40)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="14">bagel_7b_pt on H200, simulated: tokens/s/GPU of the best grid</text>',
    ]
    for speed in range(0, int(top) + 1, 1000):
        parts.append(f'<line x1="{left}" x2="{width - 30}" y1="{y(speed):.0f}" y2="{y(speed):.0f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(speed) + 4:.0f}" text-anchor="end">{speed:,}</text>')
    parts += [f'<text x="{x(g):.0f}" y="{bottom + 18}" text-anchor="middle">{g:,}</text>' for g in GPUS]
    parts.append(f'<text x="{(left + width) / 2:.0f}" y="{bottom + 40}" text-anchor="middle">GPUs</text>')
    for number, (name, curve) in enumerate(curves.items()):
        colour, line = colours[number], " ".join(f"{x(g):.1f},{y(s):.1f}" for g, s, _ in curve)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x(g):.1f}" cy="{y(s):.1f}" r="3" fill="{colour}"/>' for g, s, _ in curve]
        parts.append(f'<text x="{left + 20}" y="{bottom - 40 + 20 * number}" fill="{colour}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Simulate, draw and print."""
    cpu_backend.install()  # before anything imports megatron
    config = load(RECIPE, [f"model.vae.path={RECIPE}"])
    curves = {
        "weak: 1.5 packs per GPU and step": best_grids(config, weak=True),
        "strong: 384 packs per step": best_grids(config, weak=False),
    }
    (ROOT / "docs" / "images" / "planner_scale.svg").write_text(chart(curves), encoding="utf-8")
    for name, curve in curves.items():
        print(f"\n{name}\n\n| GPUs | tokens/s/GPU | against {curve[0][0]} | grid |\n| --- | --- | --- | --- |")
        for gpus, speed, grid in curve:
            print(f"| {gpus:,} | {speed:,.0f} | {speed / curve[0][1]:.0%} | {grid} |")


if __name__ == "__main__":
    main()
