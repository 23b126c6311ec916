"""The files that a report consists of."""

from collections.abc import Sequence
from pathlib import Path

from megabagel.bench.chart import draw
from megabagel.bench.report import Measurement, document, read, table, write
from megabagel.errors import UserError

DATA, TEXT, PLOT = "bench.json", "bench.md", "bench.svg"


def merge(parts: Sequence[Path], out: Path) -> None:
    """One report of several measurements, from the folders that they wrote."""
    save([measurement for part in parts for measurement in read(part / DATA)], out)


def save(measurements: Sequence[Measurement], out: Path) -> None:
    """Write bench.json, bench.md and bench.svg, and print the table. Raises UserError when the disk refuses."""
    write(measurements, out / DATA)
    try:
        (out / TEXT).write_text(document(measurements, PLOT))
        (out / PLOT).write_text(draw(measurements))
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}); choose another --out") from error
    print(table(measurements))
    print(f"report  {out / TEXT}")
