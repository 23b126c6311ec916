"""Estimate of one grid: memory of its fullest rank, seconds per step, and MFU in two conventions of FLOPs."""

from dataclasses import dataclass
from functools import cache

from megabagel.config.schema import Config
from megabagel.planner.calibration import Calibration
from megabagel.planner.grid import Grid
from megabagel.planner.hardware import Gpu
from megabagel.planner.memory import Memory, peak
from megabagel.planner.scenario import Case, System, our_system
from megabagel.planner.step import StepTime, step_time
from megabagel.planner.workload import Workload, typical_workload

WORDS = {
    "linears": "matrix products",
    "attention": "attention",
    "element-wise": "norms and other element-wise kernels",
    "recomputation": "recomputed activations",
    "launches": "kernel launches",
    "tensor parallel": "tensor-parallel collectives",
    "context parallel": "gathering keys and values",
    "pipeline wire": "sends between stages",
    "vit": "the ViT tower on the first stage",
    "word head": "the word head on the last stage",
    "bubble": "the pipeline bubble",
    "image codec": "encoding images",
    "data parallel": "gradient reduction over replicas",
    "optimizer": "the optimizer",
    "slack": "stragglers",
}
"""Phases of a step in words, for messages."""

SAFE = 0.93
"""Share of a GPU's memory that a plan may fill: the memory model is off by several percent (docs/planner.md)."""


@dataclass(frozen=True)
class Estimate:
    """Estimated memory and step time of one grid."""

    case: Case
    workload: Workload
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether the fullest rank stays within `SAFE` of the GPU's memory."""
        return self.memory.gib <= SAFE * self.case.gpu.memory_gib

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second per GPU, padding not counted."""
        return self.workload.tokens * self.case.config.train.packs_per_step / self.time.seconds / self.case.grid.gpus

    def mfu(self, flops: float) -> float:
        """Model FLOPs utilization: FLOPs of a step over the peak of all GPUs, for `flops` per pack."""
        peak_flops = self.case.gpu.peak(self.case.grid.precision) * self.case.grid.gpus
        return flops * self.case.config.train.packs_per_step / self.time.seconds / peak_flops

    @property
    def mfu_official(self) -> float:
        """MFU with FLOPs counted as the released trainer does."""
        return self.mfu(self.workload.flops.official)

    @property
    def mfu_masked(self) -> float:
        """MFU with attention counted over visible pairs only."""
        return self.mfu(self.workload.flops.masked)

    @property
    def limit(self) -> str:
        """Sentence for the report: the two largest phases beside GEMMs, and the memory left."""
        phases = {name: seconds for name, seconds in self.time.phases.items() if name not in ("linears", "slack")}
        first, second = sorted(phases, key=phases.__getitem__, reverse=True)[:2]
        share = {name: f"{phases[name] / self.time.seconds:.0%}" for name in (first, second)}
        left = self.case.gpu.memory_gib - self.memory.gib
        room = f"{left:.0f} GiB free" if left >= 0 else f"{-left:.0f} GiB too much"
        products = self.time.phases["linears"] / self.time.seconds
        return (
            f"{products:.0%} of the step are matrix products, {share[first]} {WORDS[first]}, {share[second]} "
            f"{WORDS[second]}; {room} on pipeline rank {self.memory.rank}"
        )


class Planner:
    """Estimates for one config on one kind of GPU.

    Args:
        config: model, data and training; its grid is replaced by that of each estimate.
        gpu: hardware numbers.
        constants: efficiency constants; default: those fitted on published systems.
        system: training system; default: this project with the config's kernels.
    """

    def __init__(
        self, config: Config, gpu: Gpu, constants: Calibration | None = None, system: System | None = None
    ) -> None:
        self.config, self.gpu, self.system = config, gpu, system or our_system(config)
        self.constants = constants or Calibration()
        self.workload = typical_workload(config)
        # Many grids of a search share (cp, tp) or dp; laying out the packs is done once for them.
        self._load = cache(self.workload.load)
        self._imbalance = cache(self.workload.imbalance)

    def case(self, grid: Grid) -> Case:
        """Inputs of the formulas for a grid."""
        load, imbalance = self._load(grid.cp, grid.tp), self._imbalance(grid.dp)
        return Case(grid.apply(self.config), grid, load, self.gpu, self.system, imbalance)

    def estimate(self, grid: Grid) -> Estimate:
        """Estimate memory and step time of a legal grid."""
        case = self.case(grid)
        return Estimate(case, self.workload, peak(case), step_time(case, self.constants))
