"""Search over all legal grids of a job; where none fits, the smallest change that would."""

from dataclasses import dataclass, replace

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.planner.estimate import Estimate, Planner
from megabagel.planner.grid import Precision, legal_grids, why_illegal
from megabagel.planner.hardware import CATALOG

MOST_GPUS = 65536


@dataclass(frozen=True)
class Found:
    """Estimates of all legal grids: those that fit, fastest first, and the others, smallest memory first."""

    fitting: list[Estimate]
    too_large: list[Estimate]

    @property
    def legal(self) -> int:
        """Number of legal grids."""
        return len(self.fitting) + len(self.too_large)


def search(planner: Planner, gpus: int, precisions: tuple[Precision, ...]) -> Found:
    """Estimate every legal grid of `gpus` GPUs. Raises UserError where no grid is legal."""
    grids = list(legal_grids(planner.config, gpus, precisions))
    if not grids:
        raise UserError(_no_grid(planner.config, gpus))
    judged = [planner.estimate(grid) for grid in grids]
    return Found(
        fitting=sorted((e for e in judged if e.fits), key=lambda e: e.time.seconds),
        too_large=sorted((e for e in judged if not e.fits), key=lambda e: e.memory.total),
    )


def shapes(found: list[Estimate], count: int) -> list[Estimate]:
    """First (best) estimate of each shape (tp, pp, cp), at most `count`; variants of one shape are left out."""
    best: dict[tuple[int, ...], Estimate] = {}
    for estimate in found:
        grid = estimate.case.grid
        best.setdefault((grid.tp, grid.pp, grid.cp), estimate)
    return list(best.values())[:count]


def what_would_fit(planner: Planner, gpus: int, precisions: tuple[Precision, ...]) -> str:
    """Remedy for a job that fits nowhere, as one sentence: more GPUs of this kind, or GPUs with more memory."""
    more = gpus
    while (more := more * 2) <= MOST_GPUS:
        legal = any(True for _ in legal_grids(planner.config, more, precisions))
        if legal and (best := search(planner, more, precisions).fitting):
            return f"{more} of these GPUs would do ({best[0].case.grid})"
    for gpu in sorted(CATALOG.values(), key=lambda g: g.memory_gib):
        if gpu.memory_gib > planner.gpu.memory_gib:
            other = Planner(planner.config, gpu, planner.constants, planner.system)
            if best := search(other, gpus, precisions).fitting:
                return f"{gpus} {gpu.name} would do ({best[0].case.grid})"
    return (
        "no larger job of these GPUs and no larger GPU does; make packs shorter (data.max_tokens) or the model smaller"
    )


def _no_grid(config: Config, gpus: int) -> str:
    """Error message where no grid of `gpus` GPUs is legal, with the nearest numbers of GPUs that have one."""
    plain = replace(config, parallel=replace(config.parallel, tp=1, pp=1, vpp=1, cp=1, layer_split=None))
    near = [n for n in _around(gpus) if any(True for _ in legal_grids(config, n, (config.train.precision,)))]
    return (
        f"--gpus {gpus}: no grid of tp x pp x cp x dp is legal for this config; for one, {why_illegal(plain, gpus)} "
        + (f"Nearest numbers of GPUs with a legal grid: {', '.join(map(str, sorted(near[:2])))}." if near else "")
    )


def _around(gpus: int) -> list[int]:
    """Other numbers of GPUs, nearest first: whole servers of 8, or single GPUs below that."""
    unit = 8 if gpus > 8 else 1
    base = gpus // unit * unit
    steps = (base + sign * unit * k for k in range(65) for sign in (1, -1))
    return [n for n in dict.fromkeys(steps) if n > 0 and n != gpus]
