"""Efficiency constants of the planner, and their correction from measured step times.

`plan --calibration bench.json` reads the output of `megabagel bench`: step times of the same model and packs on some
grids, with any number of packs per step. Each measurement is compared with the prediction for the config that was
measured. The geometric mean of the ratios (measured over predicted time) then multiplies every prediction.
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
    """Shares of the hardware's peaks that kernels reach, and fixed costs.

    No data sheet gives these numbers. docs/planner.md lists the published systems that they were fitted on.
    """

    gemm: float = 0.60
    """Share of the matmul peak that a GEMM reaches if it is large in all three dimensions."""
    gemm_half: float = 160.0
    """Size of one dimension at which a GEMM reaches half of `gemm` (partly filled tiles and waves, short k loops)."""
    attention: float = 0.40
    """Share of the matmul peak that attention reaches over visible pairs, forward and backward together."""
    convolution: float = 0.35
    """Share of the TF32 peak that the convolutions of the autoencoder reach."""
    memory: float = 0.70
    """Share of the memory bandwidth that element-wise kernels reach."""
    link: float = 0.75
    """Share of NVLink's or the network's bandwidth that large messages reach."""
    latency: float = 2e-5
    """Seconds of a collective of two ranks without data; grows with the logarithm of the group."""
    launch: float = 5e-6
    """Seconds to launch one kernel from Python."""
    hidden: float = 0.75
    """Share of tensor-parallel communication hidden behind GEMMs in a system that overlaps the two."""
    slack: float = 0.05
    """Share of a step that no formula covers (stragglers, logging, clock frequency)."""
    measured: float = 1.0
    """Measured over predicted step time, from a file of measurements; 1 without one."""
    source: str = "published systems"


@dataclass(frozen=True)
class Run:
    """One measured step time."""

    config: Config
    """Config of the measured run, with its own number of packs per step."""
    grid: Grid
    seconds: float


def read_measurements(path: Path, config: Config, gpu: str) -> list[Run]:
    """Read the measured runs of a file written by `megabagel bench`.

    Raises:
        UserError: the file is not a bench result, or was measured on another GPU, model or packs.
    """
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
    """Refuse a measurement of another model, other packs, other trained weights or other kernels.

    Paths are not compared: they differ between clusters and do not change the time of a step.
    """
    theirs, mine = _compared(to_dict(measured)), _compared(to_dict(config))
    for key, value in mine.items():
        found = theirs.get(key)
        if found != value:
            raise UserError(
                f"--calibration {path}: measured with {key} = {found!r}, the config has {value!r}; measure this config"
            )


def _compared(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings that must be equal in measurement and plan, by dotted key.

    Grid, precision and packs per step are left out, since the planner predicts how they change the step time.
    """
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
    """Config of a measurement. Raises ValueError where it does not fit this version's schema."""
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
    """Constants corrected by measurements whose times over the predicted ones are `ratios`."""
    # A geometric mean, because ratios multiply: 2 and 1/2 cancel.
    mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    return replace(calibration, measured=calibration.measured * mean, source=source)
