"""The few constants that no data sheet gives, and how a measured step corrects them.

`plan --calibration bench.json` reads what `megabagel bench` wrote: step times of the same model and packs on some
grids, with any number of packs per step. Each is compared with the prediction for the very config that was measured;
the ratio of measured to predicted time, the geometric mean over them, then multiplies every prediction.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import StatisticsError, median
from typing import Any

from megabagel.config.load import to_dict
from megabagel.config.schema import Config
from megabagel.config.typed import Problems, build
from megabagel.errors import UserError
from megabagel.planner.grid import Grid
from megabagel.planner.hardware import CATALOG


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

    config: Config
    """What was measured, its own number of packs per step included."""
    grid: Grid
    seconds: float


def read_measurements(path: Path, config: Config, gpu: str) -> list[Run]:
    """The runs of a file that bench wrote. Raises UserError where it is none, or of another GPU, model or packs."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        entries = [
            (entry["config"], entry["device"], entry["world"], entry["steps"]) for entry in content["measurements"]
        ]
        runs = [Run(_config(settings), _grid(settings, world), median(steps)) for settings, _, world, steps in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, StatisticsError) as error:
        raise UserError(
            f"--calibration {path}: not a result of `megabagel bench` ({type(error).__name__}: {error}); expected the "
            "bench.json that it writes"
        ) from error
    if not runs:
        raise UserError(f"--calibration {path}: holds no measurement; run `megabagel bench` again")
    for (_, device, _, _), run in zip(entries, runs, strict=True):
        if gpu in CATALOG and gpu not in device.lower():
            raise UserError(f"--calibration {path}: measured on {device!r}, but --gpu is {gpu}; name that GPU")
        _check_same(path, run.config, config)
    return runs


def _check_same(path: Path, measured: Config, config: Config) -> None:
    """Refuse a measurement of another model, other packs, other learning weights or other kernels; where files lie is
    no matter."""
    theirs, mine = _compared(to_dict(measured)), _compared(to_dict(config))
    for key, value in mine.items():
        found = theirs.get(key)
        if found != value:
            raise UserError(
                f"--calibration {path}: measured with {key} = {found!r}, the config has {value!r}; measure this config"
            )


def _compared(tree: dict[str, Any]) -> dict[str, Any]:
    """What a measurement must share with the plan, by dotted key."""
    model, data = tree["model"], tree["data"]
    vae = {key: value for key, value in model["vae"].items() if key != "path"}
    weights: dict[str, float] = {}
    for source in data["sources"]:
        weights[source["task"]] = weights.get(source["task"], 0.0) + source["weight"]
    shares = {task: round(weight / sum(weights.values()), 3) for task, weight in sorted(weights.items()) if weight}
    return {
        **{f"model.{key}": value for key, value in {**model, "vae": vae}.items()},
        **{f"data.{key}": data[key] for key in ("max_tokens", "vae_resize", "vit_resize")},
        "data.latents (set)": data["latents"] is not None,
        "data.sources (share by task)": shares,
        "train.freeze": sorted(tree["train"]["freeze"]),
        "parallel.kernels": tree["parallel"]["kernels"],
        "parallel.attention": tree["parallel"]["attention"],
    }


def _config(settings: dict[str, Any]) -> Config:
    """The config of a measurement. Raises ValueError where it is none of this version."""
    problems = Problems()
    config = build(Config, settings, problems)
    if problems.found:
        raise ValueError(problems.found[0][1])
    return config


def _grid(settings: dict[str, Any], world: int) -> Grid:
    p = settings["parallel"]
    replica = p["tp"] * p["pp"] * p["cp"]
    return Grid(p["tp"], p["pp"], p["vpp"], p["cp"], world // replica, p["recompute"], settings["train"]["precision"])


def corrected(calibration: Calibration, ratios: list[float], source: str) -> Calibration:
    """The constants after measurements that took `ratios` of the predicted times."""
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return replace(calibration, measured=calibration.measured * mean, source=source)
