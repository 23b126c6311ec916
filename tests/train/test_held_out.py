"""Held-out loss: it leaves no trace in training, agrees on every grid, and equals a definition written out by hand."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from megabagel.config.schema import Config, SourceConfig
from megabagel.errors import UserError
from tests.support.config_tree import change
from tests.support.grid_run import on_grid
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import TIMED, train

HELD = (
    SourceConfig("held draw", "scenes-*.tar", "t2i", 2.0),
    SourceConfig("held edit", "edits-*.tar", "edit", 1.0),
    SourceConfig("held clips", "clips-*.tar", "video", 1.0),
    SourceConfig("notes", "notes-*.tar", "text", 1.0),
)
"""Two data-parallel replicas cannot share 5 packs evenly; one source has the name of a training source."""


def held_config(root: Path, run: Path) -> Config:
    settings = {"data.val_sources": HELD, "train.val_every": 2, "train.val_packs": 5, "train.steps": 5}
    return change(small_config(root, run), {**settings, "checkpoint.every": 2})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def val(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("val_")}


@pytest.fixture(scope="module")
def run(ranks: RankPool, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, measured after steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("held") / "run"
    ranks.run(1, train, held_config(shapes, folder))
    return folder


def test_training_is_the_same_bit_for_bit(ranks: RankPool, shapes: Path, run: Path, tmp_path: Path) -> None:
    plain = change(held_config(shapes, tmp_path), {"train.val_every": 0, "data.val_sources": ()})
    ranks.run(1, train, plain)
    with_it, without = lines(run), lines(tmp_path)
    assert [bool(val(record)) for record in with_it] == [False, True, False, True, True]
    for one, other in zip(with_it, without, strict=True):
        kept = {name: value for name, value in one.items() if not name.startswith(("val_", *TIMED))}
        assert kept == {name: value for name, value in other.items() if not name.startswith(TIMED)}


def test_columns(run: Path) -> None:
    found = val(lines(run)[-1])
    names = {"val_loss", "val_loss_ce", "val_loss_mse", "val_loss_ce/notes", "val_loss_mse/held draw"}
    assert names < set(found) and "val_loss_mse/notes" not in found
    assert found["val_loss"] == pytest.approx(0.25 * found["val_loss_ce"] + found["val_loss_mse"])
    assert sum(name.startswith("val_loss_mse/t0.") for name in found) == 5


@pytest.mark.parametrize(("size", "grid"), [(2, (2, 1, 1, 1)), (2, (1, 2, 1, 1)), (2, (1, 1, 1, 2)), (2, (1, 1, 1, 1))])
def test_every_grid_has_the_same_losses(
    ranks: RankPool, shapes: Path, run: Path, size: int, grid: tuple[int, int, int, int], tmp_path: Path
) -> None:
    config = change(on_grid(held_config(shapes, tmp_path), *grid), {"train.steps": 2})
    ranks.run(size, train, config)
    assert val(lines(tmp_path)[1]) == pytest.approx(val(lines(run)[1]), rel=2e-5)


def by_hand(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """(columns, the same from whole packs on one device: rows found token by token)."""
    import torch

    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.train.build import build_trainer

    trainer = build_trainer(config, mesh.build(config))
    held = trainer.held_out
    assert held is not None
    state = torch.get_rng_state()
    measured = held.measure().columns(config.train)
    assert torch.equal(torch.get_rng_state(), state)
    ce: list[float] = []
    flow: list[tuple[float, float]] = []  # timestep, loss
    for task in held._tasks:
        batch = held.filler(task).batch
        outputs = trainer.runner.evaluate(trainer.builder.build(batch))
        assert outputs is not None
        ce += outputs.ce_Q.double().tolist()
        times: list[float | None] = []  # one for every latent token of the pack, in token order
        for image in (image for sample in batch.pack.samples for image in sample.latents):
            time = float(1 / (1 + np.exp(-image.raw_timestep))) if image.noised else None
            times += [time] * (image.rows * image.cols)
        for token, loss in zip(batch.rows.arrays().latent_g, outputs.mse_g.double().tolist(), strict=True):
            if token >= 0 and (time := times[token]) is not None:
                flow.append((time, loss))
    expected = {"val_loss_ce": float(np.mean(ce)), "val_loss_mse": float(np.mean([loss for _, loss in flow]))}
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        chosen = [loss for time, loss in flow if low <= time < low + 0.2]
        expected[f"val_loss_mse/t{low:.1f}-{low + 0.2:.1f}"] = float(np.mean(chosen))
    return measured, expected


def test_the_definition_written_out(ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    ((measured, expected),) = ranks.run(1, by_hand, held_config(shapes, tmp_path))
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def visits(config: Config) -> list[Any]:
    """Samples of the held-out set."""
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.train.build import build_trainer

    held = build_trainer(config, mesh.build(config)).held_out
    assert held is not None
    return [visit.key for task in held._tasks for visit in task.plan.visits]


def test_the_set_is_the_same_for_every_seed(ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    config = held_config(shapes, tmp_path)
    (first,) = ranks.run(1, visits, config)
    (second,) = ranks.run(1, visits, change(config, {"train.seed": 99, "train.packs_per_step": 2}))
    assert first == second and len(set(first)) > 5


def evaluate(*args: Any) -> list[dict[str, Any]]:
    """The command's function inside the pool's process group."""
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.evaluation import loss

    @contextmanager
    def here(config: Config) -> Iterator[mesh.Mesh]:
        yield mesh.build(config)

    with mock.patch.object(loss, "distributed", here):
        return loss.evaluate_loss(*args)


def test_evaluate_loss_is_what_training_measured(ranks: RankPool, run: Path, tmp_path: Path) -> None:
    (found,) = ranks.run(1, evaluate, run, tmp_path, (), "trained", True)
    assert [(r["checkpoint"], r["step"]) for r in found] == [(f"step_0000000{n}", n) for n in (2, 4, 5)]
    recorded = lines(run)
    for record in found:
        assert val(record) == val(recorded[record["step"] - 1])
        assert record["tokens"] == sum(line["tokens"] for line in recorded[: record["step"]])
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "| step_00000004 | trained |" in (tmp_path / "loss.md").read_text()
    # Again: everything is read from the journal, whose last line was cut off meanwhile.
    journal = tmp_path / "loss.jsonl"
    journal.write_bytes(journal.read_bytes()[:-30])
    (again,) = ranks.run(1, evaluate, run, tmp_path, (), "trained", True)
    assert again == found and len(journal.read_text().splitlines()) == 3


def test_averaged_weights_on_two_stages(ranks: RankPool, run: Path, tmp_path: Path) -> None:
    (alone,) = ranks.run(1, evaluate, run, tmp_path / "one", ())
    first, second = ranks.run(2, evaluate, run, tmp_path / "two", ("parallel.pp=2",))
    assert first == second and alone[0]["weights"] == "ema"
    assert val(first[0]) == pytest.approx(val(alone[0]), rel=2e-5)
    assert val(alone[0])["val_loss"] != val(lines(run)[-1])["val_loss"]


def test_refusals(run: Path, tmp_path: Path) -> None:
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.evaluation.loss import evaluate_loss

    with pytest.raises(UserError, match="--every-checkpoint needs a run folder"):
        evaluate_loss(run / "checkpoints" / "step_00000002", tmp_path, every=True)
    with pytest.raises(UserError, match=r"data\.val_sources"):
        evaluate_loss(run, tmp_path, ("train.val_every=0", "data.val_sources=[]"))
