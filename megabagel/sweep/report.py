"""The result of a sweep: one table with paired differences, one picture, and all numbers as JSON.

OUT/sweep.md     final value of every metric by point, and its difference from the baseline, seed by seed
OUT/sweep.png    the first metric over tokens, mean over seeds
OUT/sweep.json   the same numbers by run
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from megabagel.evaluation.charts import line_chart, markdown_table
from megabagel.evaluation.intervals import Estimate, mean, paired
from megabagel.journal import Record, write_json, write_whole
from megabagel.sweep.plan import Run, Sweep, config_of

Final = dict[str, dict[int, float]]
"""Last value of a metric by point and seed."""


def records_of(run: Run) -> list[Record]:
    """The finished steps of a run; a last line that a crash cut off is left out."""
    path, found = run.folder / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def write_report(sweep: Sweep, out: Path) -> str:
    """Write the three files; returns the table. Runs that are not finished are left out and counted."""
    records = {run: _finished(sweep, run) for run in sweep.runs}
    finals = {name: _final(sweep, records, name) for name in sweep.metrics}
    text = table(sweep, finals, records)
    write_whole(out / "sweep.md", text)
    write_whole(out / "sweep.png", _picture(sweep, records))
    runs = [
        {
            "point": run.point,
            "seed": run.seed,
            "steps": len(lines),
            "tokens": sum(line["tokens"] for line in lines),
            "seconds": sum(line["seconds"] for line in lines),
            **{name: finals[name][run.point].get(run.seed) for name in sweep.metrics},
        }
        for run, lines in records.items()
    ]
    write_json(out / "sweep.json", {"baseline": sweep.baseline, "metrics": sweep.metrics, "runs": runs})
    return text


def _finished(sweep: Sweep, run: Run) -> list[Record]:
    """The steps of a run that has all of them; else none, since an early loss would pass for a final one."""
    lines = records_of(run)
    return lines if lines and lines[-1].get("step") == config_of(sweep, run).train.steps else []


def _final(sweep: Sweep, records: Mapping[Run, Sequence[Record]], name: str) -> Final:
    found: Final = {point: {} for point in sweep.points}
    for run, lines in records.items():
        values = [line[name] for line in lines if name in line]
        if values:
            found[run.point][run.seed] = values[-1]
    return found


def compare(values: Mapping[int, float], base: Mapping[int, float]) -> Estimate | None:
    """Mean difference from the baseline over the seeds that both have."""
    common = [seed for seed in values if seed in base]
    return paired([base[seed] for seed in common], [values[seed] for seed in common])


def table(sweep: Sweep, finals: Mapping[str, Final], records: Mapping[Run, Sequence[Record]]) -> str:
    """Markdown: a row per point; intervals are Student's at 95 %, over seeds."""
    head = ["point", "runs", "tokens", "minutes"]
    for name in sweep.metrics:
        head += [name, f"minus {sweep.baseline}"]
    rows = []
    for point in sweep.points:
        runs = [records[run] for run in sweep.of(point) if records[run]]
        tokens, seconds = (
            fmean(sum(line[key] for line in lines) for lines in runs) if runs else 0.0 for key in ("tokens", "seconds")
        )
        cells = [point, f"{len(runs)} of {len(sweep.of(point))}", f"{tokens:,.0f}", f"{seconds / 60:.1f}"]
        for name in sweep.metrics:
            final = finals[name]
            cells.append(_text(mean(list(final[point].values()))))
            cells.append("" if point == sweep.baseline else _text(compare(final[point], final[sweep.baseline]), "+"))
        rows.append(cells)
    return markdown_table(head, rows)


def _text(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None:
        return ""
    if estimate.count == 1:
        return f"{estimate.value:{sign}.4f} (one seed)"
    return f"{estimate.value:{sign}.4f} ± {(estimate.high - estimate.low) / 2:.4f}"


def _picture(sweep: Sweep, records: Mapping[Run, Sequence[Record]]) -> bytes:
    """The first metric over tokens seen; a point is drawn where all its runs have one."""
    name, curves = sweep.metrics[0], {}
    for point in sweep.points:
        by_step: dict[int, list[tuple[float, float]]] = {}
        runs = [records[run] for run in sweep.of(point) if records[run]]
        for lines in runs:
            tokens = 0
            for line in lines:
                tokens += line["tokens"]
                if name in line:
                    by_step.setdefault(line["step"], []).append((tokens, line[name]))
        whole = {step: pairs for step, pairs in by_step.items() if len(pairs) == len(runs)}
        curves[point] = [(fmean(t for t, _ in pairs), fmean(v for _, v in pairs)) for _, pairs in sorted(whole.items())]
    return line_chart(curves, f"{sweep.path.stem}: mean over seeds", "tokens seen", name)
