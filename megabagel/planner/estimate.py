"""One grid, judged: memory of its fullest rank, seconds of a step, speed in both conventions."""

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
"""Phases of a step in words."""

SAFE = 0.93
"""Share of a GPU's memory that a plan may fill: the memory model is off by several percent (docs/planner.md)."""


@dataclass(frozen=True)
class Estimate:
    """What the planner says of one grid."""

    case: Case
    workload: Workload
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has room, with some to spare."""
        return self.memory.gib <= SAFE * self.case.gpu.memory_gib

    @property
    def tokens_per_second(self) -> float:
        """Per GPU; padding is not counted."""
        return self.workload.tokens * self.case.config.train.packs_per_step / self.time.seconds / self.case.grid.gpus

    def mfu(self, flops: float) -> float:
        """Model FLOPs of a pack against the peak of all GPUs."""
        peak_flops = self.case.gpu.peak(self.case.grid.precision) * self.case.grid.gpus
        return flops * self.case.config.train.packs_per_step / self.time.seconds / peak_flops

    @property
    def mfu_official(self) -> float:
        """In the released trainer's convention."""
        return self.mfu(self.workload.flops.official)

    @property
    def mfu_masked(self) -> float:
        """By visible pairs."""
        return self.mfu(self.workload.flops.masked)

    @property
    def limit(self) -> str:
        """One sentence: what takes the time beside matrix products, and how much memory is left."""
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
    """Estimates for one config on one kind of GPU."""

    def __init__(
        self, config: Config, gpu: Gpu, constants: Calibration | None = None, system: System | None = None
    ) -> None:
        self.config, self.gpu, self.system = config, gpu, system or our_system(config)
        self.constants = constants or Calibration()
        self.workload = typical_workload(config)
        self._load = cache(self.workload.load)
        self._imbalance = cache(self.workload.imbalance)

    def case(self, grid: Grid) -> Case:
        """The grid with its load."""
        load, imbalance = self._load(grid.cp, grid.tp), self._imbalance(grid.dp)
        return Case(grid.apply(self.config), grid, load, self.gpu, self.system, imbalance)

    def estimate(self, grid: Grid) -> Estimate:
        """Judge a legal grid."""
        case = self.case(grid)
        return Estimate(case, self.workload, peak(case), step_time(case, self.constants))
