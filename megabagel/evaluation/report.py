"""`megabagel evaluate report`: several evaluations side by side with published numbers, and their pictures.

OUT/report.md    a table per suite: a column per evaluation, then the published models, with sources
OUT/report.png   the same items drawn by each model, one row per item
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from megabagel.errors import UserError
from megabagel.evaluation.charts import markdown_table
from megabagel.evaluation.generate import OUTPUTS, finished
from megabagel.evaluation.intervals import Estimate
from megabagel.evaluation.published import FIGURES
from megabagel.evaluation.run import SUMMARY
from megabagel.journal import Record, write_whole

ROWS, CELL, TEXT = 8, 128, 16
"""Items on the picture; side of a cell and height of a line, pixels."""


@dataclass(frozen=True)
class Result:
    """A finished evaluation."""

    folder: Path
    summary: Record

    @property
    def label(self) -> str:
        """Short name: the folder's."""
        return self.folder.name


def read_results(folders: Sequence[Path]) -> list[Result]:
    """Read the summaries. Raises UserError for a folder without one."""
    found = []
    for folder in folders:
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            suite, scores = summary["suite"], summary["scores"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder}: holds no result of a suite ({error}); expected {SUMMARY} of evaluate"
            ) from error
        if not isinstance(suite, str) or not isinstance(scores, dict):
            raise UserError(f"{folder / SUMMARY}: suite = {suite!r:.40}; expected a result of evaluate")
        found.append(Result(folder, summary))
    return found


def write_report(folders: Sequence[Path], out: Path) -> str:
    """Write table and picture; returns the text."""
    results = read_results(folders)
    suites: dict[str, list[Result]] = {}
    for result in results:
        suites.setdefault(result.summary["suite"], []).append(result)
    parts = [section(suite, members) for suite, members in suites.items()]
    drawn = [result for result in results if (result.folder / OUTPUTS).is_dir()]
    if drawn:
        _sheet(drawn).save(out / "report.png")
        parts.append("![Pictures of each model, item by item](report.png)\n")
    text = "# Evaluation report\n\n" + "\n".join(parts)
    write_whole(out / "report.md", text)
    return text


def section(suite: str, results: Sequence[Result]) -> str:
    """The table of one suite."""
    figures = [figure for figure in FIGURES if figure.suite == suite]
    models = list(dict.fromkeys(figure.model for figure in figures))
    known = {(figure.model, figure.score): figure.value for figure in figures}
    names = list(dict.fromkeys(name for result in results for name in result.summary["scores"]))
    rows = []
    for name in names:
        mine = [_cell(result.summary["scores"].get(name)) for result in results]
        rows.append([name, *mine, *(known.get((model, name), "") for model in models)])
    rows.append(["scored", *(f"{r.summary['scored']} of {r.summary['outputs']}" for r in results), *[""] * len(models)])
    rows.append(["judge", *((r.summary["judge"] or {}).get("judge", "none") for r in results), *[""] * len(models)])
    text = f"## {suite}\n\n" + markdown_table(
        ["score", *(r.label for r in results), *(f"{m}, published" for m in models)], rows
    )
    sources = "; ".join(dict.fromkeys(figure.source for figure in figures))
    return text + (
        f"\nPublished: {sources}. Comparable with the same judge, questions and settings only.\n" if sources else ""
    )


def _cell(score: Record | None) -> str:
    if not score:
        return ""
    scale = score["scale"]
    estimate = Estimate(score["value"], score["low"], score["high"], score["count"])
    return estimate.text(scale, 1 if scale == 100 else 3)


def _sheet(results: Sequence[Result]) -> Image.Image:
    """Pictures of the first items that every evaluation has, a column per evaluation."""
    files = [{key: r["file"] for key, r in finished(result.folder).items() if "file" in r} for result in results]
    common = [key for key in files[0] if all(key in each for each in files)][:ROWS]
    sheet = Image.new("RGB", (max(1, len(results)) * CELL, TEXT + max(1, len(common)) * (CELL + TEXT)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (result, each) in enumerate(zip(results, files, strict=True)):
        draw.text((column * CELL + 2, 1), result.label[:20], "black", font)
        for row, key in enumerate(common):
            with Image.open(result.folder / OUTPUTS / each[key]) as picture:
                sheet.paste(picture.convert("RGB").resize((CELL, CELL)), (column * CELL, TEXT + row * (CELL + TEXT)))
            draw.text((column * CELL + 2, TEXT + row * (CELL + TEXT) + CELL), key[0][-20:], "black", font)
    return sheet
