"""Activation strength of a model's understanding and generation neurons over tasks (SRUM appendix C).

The activation of MLP neuron i is silu(gate) * up, signed, as the input of `down`, meaned over a sample's tokens. A
neuron belongs to an expert of a layer, and only tokens of that expert reach it: the neurons of the generation expert
are 0 on a task without latents. Means are streamed, so memory does not grow with the number of samples; tensor-,
pipeline- and context-parallel ranks add their parts.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megabagel.errors import UserError
from megabagel.evaluation.charts import bar_chart, markdown_table
from megabagel.evaluation.shapes_suite import page_of, shapes_suite
from megabagel.inference.api import Pipeline
from megabagel.journal import write_whole
from megabagel.model.layers import Layer
from megabagel.parallel.mesh import Mesh
from megabagel.posttrain.activation import Clusters, clusters, strength

TASKS = ("und", "gen")


@dataclass(frozen=True)
class Sample:
    """A prompt of one kind of task."""

    task: str
    """`und`: to answer; `gen`: to draw."""
    prompt: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Settings:
    """How samples are answered and drawn."""

    size: tuple[int, int] | None = None
    """Width and height of pictures; None: largest trained square."""
    points: int = 25
    """Grid points of the sampler."""
    max_new_tokens: int = 32


class ActivationMeter:
    """Sums of neuron activations over the tokens of one sample, read by hooks on the MLPs of a pipeline.

    Args:
        model: the pipeline; every pass between `start` and `mean` counts.
        mesh: its grid; None: this device alone.
    """

    def __init__(self, model: Pipeline, mesh: Mesh | None) -> None:
        self.runner, self.mesh, config = model.engine.runner, mesh, model.config.model
        self.experts = 1 if config.variant == "dense" else 2
        self.shape = (config.layers, self.experts, config.ffn)
        self.sums, self.tokens = np.zeros(self.shape), np.zeros(self.shape[:2])
        self._turn: dict[int, int] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Read the MLPs while the context is open."""
        handles = []
        for number, layer in self.runner.stage.layers.items():
            assert isinstance(layer, Layer)
            copies = [layer.mlp.und, layer.mlp.gen] if layer.mlp.doubled else [layer.mlp.und]
            for expert, copy in enumerate(copies):
                hook = partial(self._add, int(number), expert)
                handles.append(copy.down.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self) -> None:
        """Forget the sample before."""
        self.sums[:], self.tokens[:] = 0, 0

    def mean(self) -> np.ndarray:
        """Mean over the sample's tokens since `start`, [layers, experts, ffn], on every rank alike; 0 without tokens.

        Neurons of all tensor-parallel ranks are side by side.
        """
        sums, tokens = torch.from_numpy(self.sums), torch.from_numpy(self.tokens)
        if self.mesh is not None:
            # Each layer is on one pipeline rank and each neuron on one tensor-parallel rank, with zeros elsewhere.
            # Rows are split over cp; every tp rank has counted all rows of its layers.
            for axis, tensors in (
                (self.mesh.tp, [sums]),
                (self.mesh.pp, [sums, tokens]),
                (self.mesh.cp, [sums, tokens]),
            ):
                for tensor in tensors if axis.size > 1 else []:
                    dist.all_reduce(tensor, group=axis.group)
        return (sums / tokens.clamp(min=1)[..., None]).numpy()

    def _add(self, layer: int, expert: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        (activation_TF,) = inputs
        placement = self.runner.placement
        assert placement is not None
        blocks = [placement.token_T[: placement.und] >= 0, placement.token_T[placement.und :] >= 0]
        which = expert
        if self.experts == 1:
            # The one copy of a dense layer gets both experts' rows in turn, und first; its means are over all tokens.
            which = self._turn.get(layer, 0) if placement.gen else 0
            self._turn[layer] = 1 - which if placement.gen else 0
        real_T = blocks[which]
        if not len(activation_TF):
            return
        values = activation_TF[torch.from_numpy(real_T)].double().sum(0).cpu().numpy()
        first = len(values) * (self.mesh.tp.rank if self.mesh is not None else 0)
        self.sums[layer, expert, first : first + len(values)] += values
        self.tokens[layer, expert] += real_T.sum()


def task_means(model: Pipeline, mesh: Mesh | None, samples: Sequence[Sample], settings: Settings) -> np.ndarray:
    """Mean activation of every neuron over the samples of both tasks, [2 tasks, neurons].

    Args:
        model: run on one sample at a time, so that all tokens of a pass are the sample's.
        mesh: the model's grid; None: this device alone.
        samples: of both tasks.
        settings: how they are answered and drawn.
    """
    meter = ActivationMeter(model, mesh)
    total, counts = np.zeros((2, int(np.prod(meter.shape)))), np.zeros(2)
    with meter.hooked():
        for sample in samples:
            meter.start()
            if sample.task == "und":
                model.ask(sample.images, sample.prompt, max_new_tokens=settings.max_new_tokens)
            else:
                model.generate(sample.prompt, size=settings.size, points=settings.points)
            task = TASKS.index(sample.task)
            total[task] += meter.mean().ravel()
            counts[task] += 1
    return total / counts[:, None]


def samples_of(tasks: str, seed: int = 0, size: int = 64) -> list[Sample]:
    """Samples of `shapes:COUNT` (that many questions and prompts of the held-out suite) or of a JSONL file.

    Args:
        tasks: `shapes:COUNT`, or a file of lines {"task": "und" | "gen", "prompt": ..., "images": [files]}.
        seed: of the suite.
        size: side of the suite's pages in pixels.

    Raises:
        UserError: the file has another form, or one of the two tasks has no sample.
    """
    if tasks.startswith("shapes:") and tasks[7:].isdecimal():
        items = [item for item in shapes_suite(seed, int(tasks[7:])) if item["ability"] in ("ask", "draw")]
        found = [
            Sample("und" if item["ability"] == "ask" else "gen", item["prompt"], _pages(item, size)) for item in items
        ]
    else:
        found = list(_read(Path(tasks)))
    missing = [task for task in TASKS if not any(sample.task == task for sample in found)]
    if missing:
        raise UserError(f"{tasks}: no sample of task {missing[0]}; expected samples to answer (und) and to draw (gen)")
    return found


def _pages(item: dict[str, Any], size: int) -> tuple[Image.Image, ...]:
    page = page_of(item, size)
    return () if page is None else (Image.fromarray(page),)


def _read(path: Path) -> Iterable[Sample]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected shapes:COUNT or a JSONL file") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            task, prompt, images = entry["task"], entry["prompt"], entry.get("images", [])
            if task not in TASKS or not isinstance(prompt, str) or (images and task == "gen"):
                raise ValueError
            opened = tuple(Pipeline.open(path.parent / image) for image in images)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            form = '{"task": "und" or "gen", "prompt": text, "images": [files] for "und"}'
            raise UserError(f"{path}, line {number}: expected {form}, found {line[:80]!r}") from error
        yield Sample(task, prompt, opened)


@dataclass(frozen=True)
class Table:
    """Strength of both clusters on both tasks for some models."""

    clusters: Clusters
    strengths: dict[str, dict[str, float]]
    """By model, then by `<task>_task/<cluster>_cluster`."""


def compare(means: dict[str, np.ndarray], percentile: float) -> Table:
    """Strengths of all models in the clusters of the first one.

    Args:
        means: [2 tasks, neurons] by model (`task_means`), the base model first.
        percentile: tau_act of algorithm 1; the paper gives no value.
    """
    base = next(iter(means.values()))
    found = clusters(base[0], base[1], percentile)
    of = {"und": found.und, "gen": found.gen}
    strengths = {
        name: {
            f"{task}_task/{which}_cluster": strength(mean[number][None], of[which])
            for number, task in enumerate(TASKS)
            for which in TASKS
        }
        for name, mean in means.items()
    }
    return Table(found, strengths)


def write_table(table: Table, out: Path, about: dict[str, Any]) -> str:
    """Write activations.json, .md and .png into a folder; returns the Markdown table."""
    rows = [[name, *(f"{value:.4f}" for value in of.values())] for name, of in table.strengths.items()]
    head = ["model", *(key.replace("_", " ").replace("/", ", ") for key in next(iter(table.strengths.values())))]
    text = markdown_table(head, rows)
    sizes = {"und": len(table.clusters.und), "gen": len(table.clusters.gen)}
    content = {**about, "threshold": table.clusters.threshold, "neurons": sizes, "strength": table.strengths}
    groups = {
        key: {name: of[key] for name, of in table.strengths.items()} for key in next(iter(table.strengths.values()))
    }
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "activations.json", json.dumps(content, indent=1).encode() + b"\n")
    write_whole(out / "activations.md", text.encode())
    write_whole(out / "activations.png", bar_chart(groups, "mean activation of neuron clusters", "strength"))
    return text
