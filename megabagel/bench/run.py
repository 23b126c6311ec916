"""The command's work on every rank: measure, then write the report on rank 0."""

import logging
from pathlib import Path

from megabagel.bench.measure import Request, measure
from megabagel.bench.output import save
from megabagel.config.schema import Config
from megabagel.log import configure_log
from megabagel.parallel.mesh import distributed
from megabagel.runtime.collective_errors import on_rank0
from megabagel.runtime.device import comm_backend

logger = logging.getLogger(__name__)


def main(config: Config, name: str, request: Request, out: Path) -> None:
    """Measure a config on the ranks of this job and write the report on rank 0. Called once per rank.

    Args:
        config: run to measure.
        name: label, to which the grid is added.
        request: numbers of steps, and the kind of data.
        out: folder of the report.
    """
    with distributed(config) as mesh:
        configure_log(mesh.world.rank)
        logger.info("grid: %s, %s on %s", mesh.describe(), config.train.precision, comm_backend())
        found = measure(f"{name} {_grid(config, mesh.dp.size)}", config, mesh, request)
        on_rank0(lambda: save([found], out))


def _grid(config: Config, dp: int) -> str:
    """The axes with more than one rank: tp2 pp4 vpp2."""
    grid = config.parallel
    sizes = {"tp": grid.tp, "pp": grid.pp, "vpp": grid.vpp, "cp": grid.cp, "dp": dp}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "alone"
