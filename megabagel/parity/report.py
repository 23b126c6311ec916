"""Report of `megabagel parity`: the table, the timing, and both as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megabagel.errors import UserError
from megabagel.parity.comparisons import Gate, Row


@dataclass(frozen=True)
class Clock:
    """Medians over several forward and backward passes; CPU seconds are summed over ranks."""

    runs: int
    wall_seconds: float
    cpu_seconds: float
    gflops: float
    """10^9 floating-point operations of matrix products that the batch needs (`sequence.flops.needed_flops`), by wall
    seconds, of all ranks together."""
    passes: str = "forward + backward"


@dataclass(frozen=True)
class Report:
    """One case."""

    case: str
    rows: Sequence[Row]
    clock: Clock | None = None
    notes: Sequence[str] = ()

    @property
    def passed(self) -> bool:
        """Whether no row fails."""
        return all(row.verdict != "FAIL" for row in self.rows)

    @property
    def closest(self) -> Row | None:
        """The judged row that comes closest to its gate, or goes furthest beyond it."""
        judged = [row for row in self.rows if row.gate.limit is not None]
        return max(judged, key=lambda row: _share(row), default=None)

    def text(self) -> str:
        """The table and a line of summary."""
        width = max([len(row.name) for row in self.rows], default=0)
        head = f"{'':{width}}  {'max abs':>9}  {'max rel':>9}  {'rel L2':>9}  {'tolerance':>11}"
        lines = [self.case, *([head] if self.rows else [])]
        for row in self.rows:
            numbers = f"{row.max_abs:9.2e}  {row.max_rel:9.2e}  {row.rel_l2:9.2e}"
            lines.append(f"{row.name:{width}}  {numbers}  {_gate(row):>11}  {row.verdict:4}  {row.worst}".rstrip())
        lines += [f"note: {note}" for note in self.notes]
        if self.clock:
            lines.append(
                f"{self.clock.passes}: {self.clock.wall_seconds:.4f} s wall, {self.clock.cpu_seconds:.4f} s CPU "
                f"(medians of {self.clock.runs}), {self.clock.gflops:.1f} GFLOP/s"
            )
        verdicts, worst = [row.verdict for row in self.rows], self.closest
        failed, idle = verdicts.count("FAIL"), verdicts.count("-")
        if worst:
            judged = len(verdicts) - idle
            summary = f"{failed} of {judged} rows FAIL" if failed else f"all {judged} rows ok"
            summary += f", {idle} not judged" if idle else ""
            named = " ".join(filter(None, (worst.name, worst.worst)))
            close = f"; closest to its tolerance: {named} ({worst.error:.1e})" if worst.error else ""
            lines.append(f"{self.case}: {summary}{close}")
        return "\n".join(lines)


def from_plain(content: dict[str, Any]) -> Report:
    """A report from what `asdict` made of it, on another rank."""
    rows = [Row(**{**row, "gate": Gate(**row["gate"])}) for row in content["rows"]]
    clock = Clock(**content["clock"]) if content["clock"] else None
    return Report(content["case"], rows, clock, content["notes"])


def check_writable(path: Path) -> None:
    """Raise UserError, before anything runs, for a file whose folder does not exist."""
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--json {path}: cannot be written; expected a file in a folder that exists")


def write_json(path: Path, reports: Sequence[Report], about: dict[str, Any]) -> None:
    """Write everything that was printed. Raises UserError when the file cannot be written."""
    rows = [{"case": report.case, **_row(row)} for report in reports for row in report.rows]
    clocks = {report.case: asdict(report.clock) for report in reports if report.clock}
    content = {
        **about,
        "verdict": "ok" if all(report.passed for report in reports) else "FAIL",
        "cases": {report.case: {"passed": report.passed, "notes": list(report.notes)} for report in reports},
        "rows": rows,
        "clocks": clocks,
        "wall_seconds": sum(clock["wall_seconds"] for clock in clocks.values()) if clocks else None,
        "cpu_seconds": sum(clock["cpu_seconds"] for clock in clocks.values()) if clocks else None,
    }
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}); name a file in a folder") from error


def _row(row: Row) -> dict[str, Any]:
    numbers = {name: value for name, value in asdict(row).items() if name not in ("gate", "worst")}
    finite = {name: value if value == value and abs(value) != float("inf") else str(value)
              for name, value in numbers.items() if name != "name"}  # fmt: skip
    return {
        "name": row.name,
        **finite,
        "measure": row.gate.measure,
        "tolerance": row.gate.limit,
        "verdict": row.verdict,
        **({"worst": row.worst} if row.worst else {}),
    }


def _gate(row: Row) -> str:
    if row.gate.limit is None:
        return "-"
    unit = {"exact": "exact", "max_abs": "abs", "rel_l2": "L2"}[row.gate.measure]
    return unit if unit == "exact" else f"{row.gate.limit:.1e} {unit}"


def _share(row: Row) -> float:
    """How much of its tolerance a row uses up."""
    if row.error != row.error:
        return float("inf")
    return row.error / row.gate.limit if row.gate.limit else float("inf") if row.error else 0.0
