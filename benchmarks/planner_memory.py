"""The planner's memory model against a small trainer on this CPU: `python benchmarks/planner_memory.py`.

Prints the table of docs/planner.md: bytes by category, summed over pipeline ranks, on several grids.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.planner.test_memory import GRIDS
from tests.support.measured import measured, rows
from tests.support.rank_pool import RankPool


def main() -> None:
    """Measure every grid."""
    pool = RankPool()
    print("| grid | category | predicted kB | measured kB | error |\n| --- | --- | --- | --- | --- |")
    for grid in GRIDS:
        for row in rows(grid, pool.run(grid.gpus, measured, grid)):
            place = f"{grid}, {grid.precision}"
            sizes = f"{row.predicted / 1e3:,.0f} | {row.measured / 1e3:,.0f}"
            print(f"| {place} | {row.category} | {sizes} | {row.error:+.1%} |")


if __name__ == "__main__":
    main()
