"""The few constants that no data sheet gives, and how a measured step corrects them.

`plan --calibration bench.json` reads what `megabagel bench` wrote: step times of the same model and packs on some
grids. The ratio of measured to predicted time, the geometric mean over them, then multiplies every prediction.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, median
from typing import Any

from megabagel.config.load import to_dict
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.plan.grid import Grid
from megabagel.plan.hardware import CATALOG


@dataclass(frozen=True)
class Calibration:
    """Shares of a peak that kernels reach, and costs that do not scale. docs/planner.md says what each was fitted
    on."""

    gemm: float = 0.60
    """Of the matmul peak, for a GEMM that is large in all three dimensions."""
    gemm_half: float = 160.0
    """A GEMM with a dimension of this size runs at half of that (tiles and waves that are not full, k loops that
    end)."""
    attention: float = 0.40
    """Of the matmul peak, over visible pairs, forward and backward together."""
    convolution: float = 0.35
    """Of the TF32 peak: the codec's convolutions."""
    memory: float = 0.70
    """Of the memory bandwidth: element-wise kernels."""
    link: float = 0.75
    """Of NVLink's or the network's bandwidth, for large messages."""
    latency: float = 2e-5
    """Seconds of a collective without data."""
    launch: float = 5e-6
    """Seconds to launch one kernel from Python."""
    hidden: float = 0.75
    """Share of tensor-parallel communication that a system which overlaps it hides."""
    slack: float = 0.05
    """Of a step: what no formula names (stragglers, logging, the clock)."""
    measured: float = 1.0
    """Measured over predicted step time, from a file of measurements; 1 without."""
    source: str = "published systems"


@dataclass(frozen=True)
class Run:
    """One measured step time."""

    grid: Grid
    seconds: float


def read_measurements(path: Path, config: Config, gpu: str) -> list[Run]:
    """The runs of a file that bench wrote. Raises UserError where it is none, or of another GPU, model or packs."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            (entry["config"], entry["device"], entry["world"], entry["steps"]) for entry in content["measurements"]
        ]
        runs = [Run(_grid(settings, world), median(steps)) for settings, _, world, steps in entries]
    except (OSError, ValueError, TypeError, KeyError, StatisticsError) as error:
        raise UserError(
            f"--calibration {path}: not a result of `megabagel bench` ({type(error).__name__}: {error}); expected the "
            "bench.json that it writes"
        ) from error
    if not runs:
        raise UserError(f"--calibration {path}: holds no measurement; run `megabagel bench` again")
    for settings, device, _, _ in entries:
        if gpu in CATALOG and gpu not in device.lower():
            raise UserError(f"--calibration {path}: measured on {device!r}, but --gpu is {gpu}; name that GPU")
        _check_same(path, settings, config)
    return runs


def _check_same(path: Path, settings: dict[str, Any], config: Config) -> None:
    """Refuse a measurement of another model or of packs of another length; where the codec's weights lie is no
    matter."""
    theirs, mine = _shapes(settings), _shapes(to_dict(config))
    for key, value in mine.items():
        found = theirs.get(key)
        if found != value:
            raise UserError(
                f"--calibration {path}: measured with {key} = {found!r}, the config has {value!r}; measure this config"
            )


def _shapes(tree: dict[str, Any]) -> dict[str, Any]:
    vae = {key: value for key, value in tree["model"]["vae"].items() if key != "path"}
    return {**tree["model"], "vae": vae, "max_tokens": tree["data"]["max_tokens"]}


def _grid(settings: dict[str, Any], world: int) -> Grid:
    p = settings["parallel"]
    replica = p["tp"] * p["pp"] * p["cp"]
    return Grid(p["tp"], p["pp"], p["vpp"], p["cp"], world // replica, p["recompute"], settings["train"]["precision"])


def corrected(calibration: Calibration, ratios: list[float], source: str) -> Calibration:
    """The constants after measurements that took `ratios` of the predicted times."""
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return replace(calibration, measured=calibration.measured * mean, source=source)
