"""`megabagel posttrain run`: all stages and training by one config, in rounds. Every stage is resumable, so is the run.

    WORK/round_1/    drawn.jsonl, images/, boxes.jsonl, judged.jsonl, train.jsonl, show.html, run/ (the training run)
    WORK/round_2/    the same, drawn by the model that round 1 trained

Each stage is a command of its own process: a model on a grid and a training run do not share memory, and a killed run
goes on where it was.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megabagel.config.reading import read_file
from megabagel.config.typed import Problems, build
from megabagel.config.yaml_text import MOST_BYTES, YamlError, load_yaml
from megabagel.errors import UserError


@dataclass(frozen=True)
class GeneratePlan:
    """Stage `generate`."""

    prompts: str = "scenes:96"
    candidates: int = 1
    size: tuple[int, int] | None = None
    steps: int | None = None
    text_scale: float | None = None
    think: bool = False
    seed: int = 0
    nproc: int = 1
    set: tuple[str, ...] = ()
    """Overrides of the model's config, such as parallel.tp=2."""


@dataclass(frozen=True)
class BoxesPlan:
    """Stage `boxes`; fields as in `boxes.BoxOptions`."""

    method: str = "scenes"
    most: int = 10
    cells: int = 2
    weights: str | None = None
    keep_named: bool = False


@dataclass(frozen=True)
class JudgePlan:
    """Stage `judge`; fields as in `judges.JudgeOptions`."""

    by: Literal["exact", "scenes", "model"] = "exact"
    retries: int = 2
    overall: bool = False
    think: bool = False


@dataclass(frozen=True)
class TrainPlan:
    """Training of a round."""

    config: str = ""
    """Config of `megabagel train`, with a source that reads `train.jsonl` of data.root."""
    set: tuple[str, ...] = ()
    """Further overrides."""
    nproc: int = 1


@dataclass(frozen=True)
class PostTrainPlan:
    """The whole pipeline."""

    work: str = ""
    """Folder of the pipeline."""
    model: str = ""
    """Run, checkpoint or published folder to start from."""
    init: str = ""
    """Checkpoint folder that training starts from; default: the newest of `model`, a run folder."""
    rounds: int = 1
    generate: GeneratePlan = field(default_factory=GeneratePlan)
    boxes: BoxesPlan = field(default_factory=BoxesPlan)
    judge: JudgePlan = field(default_factory=JudgePlan)
    pairs: bool = False
    train: TrainPlan = field(default_factory=TrainPlan)


def load_plan(path: Path) -> PostTrainPlan:
    """Read a plan from YAML. Raises UserError with a line per problem."""
    try:
        raw = load_yaml(read_file(path, MOST_BYTES).decode())
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a YAML file") from error
    problems = Problems()
    plan = build(PostTrainPlan, raw, problems)
    lines = [text for _, text in problems.found]
    lines += [f"{name} = '': name one" for name in ("work", "model") if not getattr(plan, name)]
    lines += [] if plan.train.config else ["train.config = '': name the config of `megabagel train`"]
    lines += [] if plan.rounds >= 1 else [f"rounds = {plan.rounds}: expected at least 1"]
    if lines:
        raise UserError("\n  ".join((f"{path}: {len(lines)} problem(s) in the plan", *lines)))
    return plan


def commands(plan: PostTrainPlan) -> Iterator[list[str]]:
    """The command line of every stage of every round, in order."""
    model = plan.model
    for number in range(1, plan.rounds + 1):
        work = Path(plan.work) / f"round_{number}"
        draw, boxes, judge = plan.generate, plan.boxes, plan.judge
        own = [f"--set={word}" for word in draw.set] + ([f"--nproc={draw.nproc}"] if draw.nproc > 1 else [])
        # A round of its own seed: the same noise would give nearly the same pictures again.
        words = [
            "generate",
            model,
            draw.prompts,
            str(work),
            "-n",
            str(draw.candidates),
            f"--seed={draw.seed + number - 1}",
        ]
        words += [f"--size={draw.size[0]}x{draw.size[1]}"] if draw.size else []
        words += [f"--steps={draw.steps}"] if draw.steps else []
        words += [f"--text-scale={draw.text_scale}"] if draw.text_scale is not None else []
        yield ["posttrain", *words, *["--think"] * draw.think, *own]
        words = ["boxes", str(work), f"--method={boxes.method}", f"--most={boxes.most}", f"--cells={boxes.cells}"]
        words += [f"--sam-weights={boxes.weights}"] if boxes.weights else []
        words += ["--keep-named"] * boxes.keep_named
        asks = boxes.method == "model" or boxes.keep_named
        yield ["posttrain", *words, *([f"--model={model}", *own] if asks else [])]
        words = ["judge", str(work), f"--by={judge.by}", f"--retries={judge.retries}", *["--overall"] * judge.overall]
        words += ["--think"] * judge.think
        yield ["posttrain", *words, *([f"--model={model}", *own] if judge.by != "exact" else [])]
        yield ["posttrain", "format", str(work), *["--pairs"] * plan.pairs]
        yield ["posttrain", "show", str(work), f"--config={plan.train.config}"]
        run = work / "run"
        start = plan.init if number == 1 and plan.init else newest(Path(model))
        words = [plan.train.config, f"run.dir={run}", f"run.init_from={start}", f"data.root={work}", *plan.train.set]
        yield ["train", *words, *([f"--nproc={plan.train.nproc}"] if plan.train.nproc > 1 else [])]
        model = str(run)


def newest(run: Path) -> Path:
    """The newest checkpoint of a run folder; a checkpoint folder is taken as it is."""
    latest = run / "checkpoints" / "latest"
    return run / "checkpoints" / latest.read_text().strip() if latest.is_file() else run


def run_plan(plan: PostTrainPlan) -> int:
    """Run all stages; returns the exit code of the first that fails, or 0."""
    # A generator, because the checkpoint that a later round starts from does not exist yet.
    for words in commands(plan):
        print(f"megabagel {' '.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "megabagel", *words], env=os.environ, check=False).returncode
        if code:
            return code
    return 0
