"""Step-time model: seconds of one optimizer step, from pipeline stages and the work done once per step."""

from collections.abc import Mapping
from dataclasses import dataclass

from megabagel.planner import communication, compute
from megabagel.planner.calibration import Calibration
from megabagel.planner.memory import stage_numbers
from megabagel.planner.scenario import Case


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by phase, along the pipeline rank that all others wait for."""

    phases: dict[str, float]
    slowest: int
    """Index of that pipeline rank."""

    @property
    def seconds(self) -> float:
        """Seconds of the whole step."""
        return sum(self.phases.values())


def layer_phases(case: Case, constants: Calibration) -> dict[str, float]:
    """Seconds of one micro-batch in one decoder layer, forward and backward, by phase."""
    phases = {name: part.total for name, part in compute.with_recompute(case, constants).items()}
    phases["tensor parallel"] = sum(communication.tensor_parallel(case, constants))
    phases["context parallel"] = sum(communication.context_parallel(case, constants))
    return phases


def stage_phases(case: Case, constants: Calibration, rank: int, layer: Mapping[str, float]) -> dict[str, float]:
    """Seconds of one micro-batch on a pipeline rank, by phase.

    Args:
        case: the run on its grid.
        constants: efficiency constants.
        rank: pipeline rank.
        layer: seconds of one decoder layer by phase, from `layer_phases`.
    """
    layers = sum(case.chunks[rank])
    phases = {name: layers * seconds for name, seconds in layer.items()}
    phases["pipeline wire"] = 2 * communication.wire(case, constants)
    phases["vit"] = compute.vit(case, constants).total if rank == 0 else 0.0
    phases["word head"] = compute.head(case, constants).total if rank == case.grid.pp - 1 else 0.0
    return phases


def step_time(case: Case, constants: Calibration) -> StepTime:
    """Time of a step: m micro-batches on the slowest pipeline rank, pipeline bubble, and the work done once per step.

    With t_s seconds per micro-batch on rank s, 1F1B takes m max(t) + (sum(t) - max(t)) / vpp; for equal stages that
    is the bubble (pp - 1) / (vpp m) of Narayanan et al., section 2.2. Images are encoded before the first
    micro-batch, while later stages wait.
    """
    layer = layer_phases(case, constants)
    stages = [stage_phases(case, constants, rank, layer) for rank in range(case.grid.pp)]
    totals = [sum(stage.values()) for stage in stages]
    slowest = max(range(len(totals)), key=totals.__getitem__)
    m = case.micro_batches
    phases = {name: m * seconds for name, seconds in stages[slowest].items()}
    phases["bubble"] = (sum(totals) - totals[slowest]) / case.grid.vpp
    phases["image codec"] = m * compute.encode(case, constants)
    phases["data parallel"] = max(
        communication.data_parallel(case, constants, rank, totals[rank]) for rank in range(case.grid.pp)
    )
    most = max(stage_numbers(case, rank).learning for rank in range(case.grid.pp))
    phases["optimizer"] = compute.optimizer(case, constants, most)
    phases["slack"] = constants.slack * sum(phases.values())
    return StepTime({name: constants.measured * seconds for name, seconds in phases.items() if seconds}, slowest)
