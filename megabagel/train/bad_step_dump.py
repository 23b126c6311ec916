"""Dump of a bad step: RUN/faults/step_00000012.json with its samples, losses and a command that replays it.

Samples are named by source, key, file and epoch, not copied: randomness is keyed, so these reproduce the step.
"""

import json
from pathlib import Path
from typing import Any

from megabagel.data.documents import Document, Loose, Passage, TextItem
from megabagel.data.index.index import Index
from megabagel.data.plan.global_plan import GlobalPlan, StepPlan
from megabagel.data.plan.planned_sample import Visit
from megabagel.train.anomaly import StepAnomaly
from megabagel.train.records import writing
from megabagel.train.step import Losses


def dump_path(folder: Path, step: StepPlan) -> Path:
    """Return the dump file of a step.

    Its number counts steps of data, which run ahead of training steps after a rollback.
    """
    return folder / "faults" / f"step_{step.number + 1:08d}.json"


def bad_step_dump(
    path: Path, anomaly: StepAnomaly, losses: Losses, norm: float, step: StepPlan, replicas: int, plan: GlobalPlan
) -> None:
    """Write the dump of a bad step.

    Args:
        path: file to write, from `dump_path`.
        anomaly: what was wrong with the step, and the policy applied.
        losses: of the step, with sums per micro-step.
        norm: global gradient norm before clipping.
        step: the planned samples of every pack.
        replicas: data-parallel size: so many packs run in one micro-step.
        plan: the data plan of the run, for names and files of samples.
    """
    sums = losses.sums.sum(2).tolist()
    content = {
        "step": step.number + 1,
        "what": anomaly.what,
        "action": anomaly.action,
        "loss": losses.total,
        "loss_ce": losses.ce,
        "loss_mse": losses.mse,
        "grad_norm": norm,
        "replay": replay(path.parents[1]),
        "micro_steps": [
            {"ce_sum": ce, "mse_sum": mse, "packs": [_samples(step, number, plan) for number in turn]}
            for (ce, mse), turn in zip(sums, step.turns(replicas), strict=True)
        ],
    }
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1))


def replay(folder: Path) -> str:
    """Return a command that replays the bad step.

    It starts from the newest checkpoint, runs in its own folder and stops at the first anomaly.
    """
    newest = sorted((folder / "checkpoints").glob("step_*/manifest.json"))
    start = newest[-1].parent if newest else "none"
    return (
        f"megabagel train {folder}/config.yaml run.resume={start} run.dir={folder}/faults/replay "
        "train.on_nonfinite=stop train.on_spike=stop checkpoint.every=0"
    )


def _samples(step: StepPlan, pack: int, plan: GlobalPlan) -> list[dict[str, Any]]:
    """Return the descriptions of all samples of a pack."""
    return [_describe(visit, plan.sources[visit.key.source].index) for visit in step.packs[pack].visits]


def _describe(visit: Visit, index: Index) -> dict[str, Any]:
    """Return name and location of a sample. Source, sample number and epoch determine all of its random choices."""
    key, document = visit.key, index.documents[visit.key.sample]
    return {
        "source": key.source,
        "key": document.key,
        "file": _file(document, index),
        "sample": key.sample,
        "epoch": key.epoch,
        "tokens": visit.size.tokens,
    }


def _file(document: Document, index: Index) -> str | None:
    """Return the file of the first item that is not a short text; short texts lie in the index itself."""
    for item in document.items:
        place = item.source if isinstance(item, TextItem) else item.member
        place = place.place if isinstance(place, Passage) else place
        if isinstance(place, Loose):
            return place.path
        if not isinstance(place, str):
            return str(index.reader.shards[place.shard])
    return None
