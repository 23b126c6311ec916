"""`megabagel evaluate loss`: the held-out loss of checkpoints, by the function that training calls.

DIR/loss.jsonl     a line per checkpoint and set of weights, every number in full precision; resumable
DIR/loss.md        the table; DIR/loss.png the curves, if there are several checkpoints
DIR/summary.json   the lines of this call
"""

import hashlib
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from megabagel.checkpoint.manifest import CONFIG
from megabagel.config.load import load, to_dict
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.evaluation.charts import line_chart, markdown_table
from megabagel.evaluation.checkpoints import checkpoints, seen
from megabagel.inference.load import open_source
from megabagel.journal import Journal, Record, write_json, write_whole
from megabagel.locks import inside, locked
from megabagel.log import configure_log
from megabagel.model.vae import build_codec
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.mesh import Mesh, distributed
from megabagel.runtime.collective_errors import on_all_ranks, on_rank0
from megabagel.runtime.device import current_device
from megabagel.runtime.launch_env import read_launch_env
from megabagel.runtime.objects import broadcast
from megabagel.train.held_out import BINS, HeldOut, HeldOutLosses, Mean, interval

_ONE_DEVICE = ("parallel.tp=1", "parallel.pp=1", "parallel.vpp=1", "parallel.cp=1", "parallel.layer_split=null")
"""The grid is the caller's, not the one that trained."""
_NO_START = ("run.resume=auto", "run.init_from=null", "data.latents=null", "telemetry.sample_every=0")
"""Files that a start of the run needed and that may be gone."""


def evaluate_loss(
    path: Path, out: Path, overrides: tuple[str, ...] = (), weights: str | None = None, every: bool = False
) -> list[Record]:
    """Measure the held-out loss of checkpoints. Called on every rank of the job.

    Args:
        path: a run folder (its newest checkpoint) or a checkpoint folder.
        out: folder of the results; checkpoints that it has are not measured again.
        overrides: `section.key=value` for the config of the run, such as data.val_sources or parallel.tp.
        weights: `ema` or `trained`; by default the averaged ones where there are any.
        every: measure all checkpoints of the run.

    Returns:
        The records of these checkpoints, by step; equal on all ranks.

    Raises:
        UserError: there is no checkpoint or no held-out set, or another evaluation is writing into `out`.
    """
    folders = checkpoints(path, every)
    config = _config(folders[0], overrides)
    with distributed(config) as mesh, ExitStack() as owned:
        configure_log(mesh.world.rank)
        on_rank0(lambda: owned.enter_context(locked(inside(out), f"--out {out}")))
        held, stages = _assemble(config, mesh)
        journal: list[Journal] = []
        on_rank0(lambda: journal.append(Journal(out / "loss.jsonl")))
        found = []
        for folder in folders:
            found.append(_measured(folder, weights, held, stages, journal[0] if journal else None))
        on_rank0(lambda: _write(out, found))
    return found


def _config(folder: Path, overrides: tuple[str, ...]) -> Config:
    """The config of the run that wrote a checkpoint, for one device unless the overrides name a grid."""
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: holds no {CONFIG} of a run, so its held-out set is unknown; name a run's checkpoint"
        )
    packs = f"train.packs_per_step={read_launch_env()[1]}"
    config = load(folder / CONFIG, [*_ONE_DEVICE, *_NO_START, packs, *overrides])
    if not config.data.val_sources:
        raise UserError(
            f"{folder / CONFIG}: data.val_sources = (); expected the sources of the held-out set, such as "
            "--set 'data.val_sources=[{name: draw, path: held-*.tar, task: t2i}]'"
        )
    return config


def _assemble(config: Config, mesh: Mesh) -> tuple[HeldOut, list[Any]]:
    """The held-out set and this rank's model chunks, whose weights are still to be read; no optimizer."""
    from megabagel.parallel.megatron import megatron_config
    from megabagel.parallel.stages import build_stages
    from megabagel.train.build import build_held_out
    from megabagel.train.step import ForwardRunner

    attention = on_all_ranks(lambda: choose_attention(config))
    kernels = on_all_ranks(lambda: choose_kernels(config))
    codec = on_all_ranks(lambda: build_codec(config.model.vae, current_device()))
    stages = build_stages(config, mesh, megatron_config(config), kernels, draw=False)
    for stage in stages:
        stage.requires_grad_(False)
    builder = InputBuilder(config, mesh, codec, current_device(), kernels, attention)
    return build_held_out(config, mesh, attention, builder, ForwardRunner(config, mesh, stages)), stages


def _measured(folder: Path, weights: str | None, held: HeldOut, stages: list[Any], journal: Journal | None) -> Record:
    """The record of one checkpoint, from the journal where it is there."""
    source = on_all_ranks(lambda: open_source(folder, weights))
    identity = {"checkpoint": folder.name, "weights": source.weights, "digest": source.digest, "set": _digest(held)}
    known = None
    if journal is not None:
        known = next((r for r in journal.records if all(r.get(k) == v for k, v in identity.items())), None)
    known = broadcast(known)
    if known is not None:
        return known
    for stage in stages:
        on_all_ranks(partial(source.fill, stage.model))
    losses, trained = held.measure(), seen(folder)
    about = {"step": trained.step, "tokens": trained.tokens, "tokens_gen": trained.tokens_gen}
    record = {**identity, **about, **losses.columns(held.config.train), **_breakdown(losses)}
    if journal is not None:
        journal.append(record)
    return record


def _digest(held: HeldOut) -> str:
    """Of the held-out set: contents of its sources, how they are packed, and timesteps."""
    data = to_dict(held.config.data)
    places = ("root", "index_dir", "tokenizer", "prefetch", "worker_timeout", "decode", "decode_threads")
    train = held.config.train
    parts = [
        held.fingerprint,
        {name: value for name, value in data.items() if name not in places},
        [train.val_packs, train.timestep_shift, train.timestep_precision],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _breakdown(losses: HeldOutLosses) -> Record:
    """Losses by source and by task, with their numbers of rows."""
    by_source = {name: (losses.ce[name], losses.mse[name]) for name in losses.tasks}
    return {"sources": _rows(by_source), "tasks": _rows(losses.by_task())}


def _rows(parts: dict[str, tuple[Mean, tuple[Mean, ...]]]) -> Record:
    return {
        name: {
            "ce": ce.value,
            "ce_tokens": ce.count,
            "mse": sum(mse, Mean()).value,
            "mse_tokens": sum(mse, Mean()).count,
            "mse_by_time": [each.value for each in mse],
        }
        for name, (ce, mse) in parts.items()
    }


def _write(out: Path, records: list[Record]) -> None:
    """Write summary, table and, of several checkpoints, the picture."""
    write_json(out / "summary.json", {"suite": "loss", "results": records})
    write_whole(out / "loss.md", table(records))
    if len(records) > 1:
        across = "tokens" if all(record["tokens"] is not None for record in records) else "step"
        names = ("val_loss_ce", "val_loss_mse")
        curves = {name: [(r[across], r[name]) for r in records if name in r] for name in names}
        write_whole(out / "loss.png", line_chart(curves, "held-out loss", across, "loss per token"))


def table(records: list[Record]) -> str:
    """Markdown: a row per checkpoint, then the newest one by source and by task."""
    times = [interval(number) for number in range(BINS)]
    names = ("val_loss", "val_loss_ce", "val_loss_mse", *(f"val_loss_mse/{time}" for time in times))
    head = ("checkpoint", "weights", "tokens", *(name.removeprefix("val_loss_mse/") for name in names))
    rows = [[r["checkpoint"], r["weights"], r["tokens"] or "", *(_shown(r.get(n)) for n in names)] for r in records]
    parts = ("by", "cross-entropy", "rows", "flow loss", "latent tokens", *times)
    newest = []
    for kind, label in (("sources", "source"), ("tasks", "task")):
        for name, row in records[-1][kind].items():
            cells = [_shown(row["ce"]), row["ce_tokens"], _shown(row["mse"]), row["mse_tokens"]]
            newest.append([f"{label} {name}", *cells, *map(_shown, row["mse_by_time"])])
    title = f"\n{records[-1]['checkpoint']}, {records[-1]['weights']} weights:\n\n"
    return markdown_table(head, rows) + title + markdown_table(parts, newest)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
