"""Emergence of abilities: scores over tokens seen, for every checkpoint of a run (BAGEL section 6, figure 7).

OUT/emergence.md     scores by checkpoint, and the tokens at which each ability first reached 85 % of its peak
OUT/emergence.png    the curves; OUT/tensorboard has them as scalars too
OUT/emergence.json   the same numbers
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megabagel.evaluation.charts import line_chart, markdown_table
from megabagel.evaluation.checkpoints import Seen
from megabagel.journal import Record, write_json, write_whole

SHARE = 0.85
"""Of the peak, at which BAGEL calls an ability learned."""


@dataclass(frozen=True)
class Ability:
    """One score over a run."""

    name: str
    points: tuple[tuple[int, float], ...]
    """(tokens or steps, score) by checkpoint."""

    @property
    def peak(self) -> float:
        """The largest score."""
        return max(score for _, score in self.points)

    @property
    def reached(self) -> int | None:
        """Place of the first checkpoint with SHARE of the peak; None if nothing was ever right."""
        return next((at for at, score in self.points if score >= SHARE * self.peak), None) if self.peak > 0 else None


def abilities(summaries: Sequence[Record], seen: Sequence[Seen], headlines: Sequence[str]) -> tuple[str, list[Ability]]:
    """Return the name of the axis (tokens, or steps where tokens are unknown) and the abilities.

    Args:
        summaries: of the evaluations of one suite, by checkpoint.
        seen: what each checkpoint was trained on.
        headlines: scores to follow; none: the first of the table.
    """
    axis = "tokens" if all(each.tokens is not None for each in seen) else "steps"
    places = [each.tokens if axis == "tokens" and each.tokens is not None else each.step for each in seen]
    names = list(headlines) or list(summaries[-1]["scores"])[:1]
    found = []
    for name in names:
        scores = [summary["scores"].get(name) for summary in summaries]
        points = tuple((at, score["value"] * score["scale"]) for at, score in zip(places, scores, strict=True) if score)
        if points:
            found.append(Ability(name, points))
    return axis, found


def write_emergence(out: Path, summaries: Sequence[Record], seen: Sequence[Seen], headlines: Sequence[str] = ()) -> str:
    """Write table, picture and scalars; returns the table.

    Args:
        out: folder that gets emergence.md, .png, .json and a TensorBoard file.
        summaries: of the checkpoints, in the order of `seen`.
        seen: step and tokens of each checkpoint.
        headlines: scores to show; empty: those that the suite names.
    """
    from megabagel.train.records import TensorBoardFile

    axis, found = abilities(summaries, seen, headlines)
    suite = summaries[-1]["suite"]
    text = table(axis, found, seen)
    write_whole(out / "emergence.md", text)
    curves = {ability.name: ability.points for ability in found}
    write_whole(out / "emergence.png", line_chart(curves, f"{suite}: score over {axis} seen", axis, "score"))
    write_json(
        out / "emergence.json",
        {"suite": suite, "axis": axis}
        | {a.name: {"points": a.points, "peak": a.peak, "reached": a.reached} for a in found},
    )
    board = TensorBoardFile(out / "tensorboard", -1)
    for each, summary in zip(seen, summaries, strict=True):
        scalars = {
            f"{suite}/{name}": score["value"] * score["scale"] for name, score in summary["scores"].items() if score
        }
        board.write({"step": each.step, **scalars})
    board.close()
    return text


def table(axis: str, found: Sequence[Ability], seen: Sequence[Seen]) -> str:
    """Markdown: a row per ability, in the order in which they were learned, and a row per checkpoint."""
    order = sorted(found, key=lambda ability: (ability.reached is None, ability.reached or 0))
    rows = [
        (a.name, f"{a.peak:.3f}", "never" if a.reached is None else f"{a.reached:,}", f"{a.points[-1][1]:.3f}")
        for a in order
    ]
    first = markdown_table(("ability", "peak", f"{axis} to {SHARE:.0%} of the peak", "last"), rows)
    by_place: list[Mapping[int, float]] = [dict(ability.points) for ability in found]
    places = sorted({at for ability in found for at, _ in ability.points})
    steps = {each.tokens if axis == "tokens" else each.step: each.step for each in seen}
    scores = [
        (steps[at], f"{at:,}", *(f"{points[at]:.3f}" if at in points else "" for points in by_place)) for at in places
    ]
    return first + "\n" + markdown_table(("step", axis, *(ability.name for ability in found)), scores)
