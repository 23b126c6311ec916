"""Scores of the picture that a model heads for at every sampling step: layout and detail (SRUM section 4.3, figure 4).

At timestep t the velocity points to x_0 = x_t - t v, which is decoded and judged like a finished picture. The paper
asks a large model for both scores; here the judge is one of `posttrain.judges`, detail being the mean of the regions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.charts import line_chart, markdown_table
from megabagel.inference.api import Pipeline
from megabagel.inference.programs import Step
from megabagel.journal import Record, write_whole
from megabagel.posttrain.judges import Judge

METRICS = ("layout", "detail")


def step_scores(model: Pipeline, prompts: Sequence[Record], judge: Judge, **options: Any) -> np.ndarray:
    """Mean scores of the predicted pictures, [steps, 2]: layout and detail of each step; NaN where no picture has one.

    Args:
        model: drawn with one picture per prompt, seed 0.
        prompts: records with `prompt`, and what the judge needs.
        judge: scores a picture; regions are those that it finds itself.
        options: of `Pipeline.submit_draw`, such as size and points.

    Raises:
        UserError: a setting makes no sense, or no prompt is given.
    """
    if not prompts:
        raise UserError("no prompt to draw; expected at least one")
    scores = []
    for prompt in prompts:
        request = model.submit_draw([prompt["prompt"]], **options)
        rows, cols = model.grid(options.get("size"), None)
        item = {key: value for key, value in prompt.items() if key not in ("id", "prompt")}
        record = {"image_file": str(prompt.get("id", "")), "prompt": prompt["prompt"], "item": item}
        scores.append([
            _scored(model, event, (rows, cols), record, judge)
            for event in model.stream(request)
            if isinstance(event, Step)
        ])  # fmt: skip
        if request.done is not None and request.done.error is not None:
            raise UserError(request.done.error)
    found = np.array(scores)
    known = ~np.isnan(found)
    return np.where(known.any(0), np.where(known, found, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _scored(model: Pipeline, step: Step, grid: tuple[int, int], record: Record, judge: Judge) -> tuple[float, float]:
    (x_t,), (velocity,) = step.x_t, step.velocity
    picture = model.pixels(x_t - step.t * velocity, *grid)
    scores = judge(Image.fromarray(picture), record, [])
    regions = [region["score"] for region in scores.regions if region["score"] is not None]
    layout = np.nan if scores.layout is None else scores.layout
    return layout, float(np.mean(regions)) if regions else np.nan


def write_scores(found: dict[str, np.ndarray], out: Path, about: dict[str, Any]) -> str:
    """Write steps.json, steps.md and a chart per metric into a folder; returns the Markdown table.

    Args:
        found: scores [steps, 2] by model (`step_scores`).
        out: folder, made where it does not exist.
        about: what the scores were measured on, for steps.json.
    """
    steps = {
        name: {metric: _numbers(scores[:, n]) for n, metric in enumerate(METRICS)} for name, scores in found.items()
    }
    write_whole(out / "steps.json", json.dumps({**about, "scores": steps}, indent=1) + "\n")
    for number, metric in enumerate(METRICS):
        curves = {name: [(n + 1.0, float(y)) for n, y in enumerate(of[:, number])] for name, of in found.items()}
        write_whole(
            out / f"steps_{metric}.png", line_chart(curves, f"{metric} of the predicted picture", "step", "score")
        )
    longest = max(len(scores) for scores in found.values())
    shown = sorted({0, longest // 4, longest // 2, 3 * longest // 4, longest - 1})
    head = ["model", "score", *(f"step {n + 1}" for n in shown)]
    rows = [
        [name, metric, *(f"{scores[n, k]:.3f}" if n < len(scores) else "" for n in shown)]
        for name, scores in found.items()
        for k, metric in enumerate(METRICS)
    ]
    text = markdown_table(head, rows)
    write_whole(out / "steps.md", text)
    return text


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]
