"""A run that is cut off and goes on leaves what an uncut run leaves; `latest`, `keep` and `resume` do what they say."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megabagel.config.schema import Config
from megabagel.data.plan.global_plan import GlobalPlan
from tests.support.config_tree import change
from tests.support.grid_run import on_grid
from tests.support.rank_pool import RankError, RankPool
from tests.support.small_run import small_config, sources_of

STEPS, CUT = 6, 5
"""A checkpoint is written every two steps; a cut run has finished CUT steps, of which the last is lost."""
TIMED = (
    *("seconds", "data_wait", "tokens_per_s_per_gpu", "mfu_", "vit_flops", "vae_flops", "mem"),
    *("rank_seconds", "slowest_rank"),
)
"""What a record says about the machine."""

Grid = tuple[int, int, int, int, int]
"""tp, pp, vpp, cp, dp"""


class Cut(Exception):
    """The machine goes away."""


def train(config: Config, cut: int | None = None) -> list[int]:
    """The program on this rank, inside the pool's process group; the steps it began. After `cut` steps it is gone."""
    from megabagel.inference.training_samples import training_sampler
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train import run

    @contextmanager
    def here(config: Config) -> Iterator[mesh.Mesh]:
        cpu_backend.install()
        yield mesh.build(config)

    train_step, begun = run.Trainer.train_step, []

    def mortal(trainer: run.Trainer, step: Any) -> Any:
        if trainer.step == cut:
            raise Cut
        begun.append(trainer.step)
        return train_step(trainer, step)

    patches = mock.patch.object(run, "distributed", here), mock.patch.object(run.Trainer, "train_step", mortal)
    with patches[0], patches[1], weights_left_open_show():
        try:
            run.main(config, sampler=training_sampler)
        except Cut:
            assert cut is not None
    return begun


@contextmanager
def weights_left_open_show() -> Iterator[None]:
    """What is left to a checkpoint to fill is NaN before. A new stage may add norms, which start as ones."""
    from megabagel.train import build_rank

    build_stages = build_rank.build_stages

    def shown(config: Config, mesh: Any, megatron: Any, kernels: Any, draw: bool, device: Any) -> Any:
        stages = build_stages(config, mesh, megatron, kernels, draw, device)
        for weight in (weight for stage in stages for weight in stage.parameters() if not draw):
            if weight.ndim > 1 or not config.run.init_from:
                weight.data.fill_(math.nan)
        return stages

    with mock.patch.object(build_rank, "build_stages", shown):
        yield


def tensors_drawn(config: Config) -> int:
    """How many initial weights the program draws on this rank."""
    from megabagel.model import init_weights

    with mock.patch.object(init_weights, "normal", mock.Mock(wraps=init_weights.normal)) as normal:
        train(config)
    return normal.call_count


class Bench:
    """Starts runs on grids, each run in a folder of its own."""

    def __init__(self, ranks: RankPool, shapes: Path, root: Path) -> None:
        self.ranks, self.shapes, self.root = ranks, shapes, root
        self.begun: list[int] = []
        """Steps of the latest run."""

    def run(self, name: str, grid: Grid = (1, 1, 1, 1, 1), cut: int | None = None, **changes: Any) -> Path:
        """Run until it ends or is cut; returns its folder."""
        tp, pp, vpp, cp, dp = grid
        folder = self.root / name
        config = small_config(self.shapes, folder)
        config = change(config, {"train.steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 2})
        config = change(config, {key.replace("__", "."): value for key, value in changes.items()})
        self.begun, *others = self.ranks.run(tp * pp * cp * dp, train, on_grid(config, tp, pp, vpp, cp), cut)
        assert all(begun == self.begun for begun in others)
        return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def bench(ranks: RankPool, shapes: Path, root: Path) -> Bench:
    return Bench(ranks, shapes, root)


@pytest.fixture(scope="module")
def uncut(bench: Bench) -> Path:
    """The run on one rank, in one go, with a sample image at the end."""
    return bench.run("uncut", telemetry__sample_every=STEPS, telemetry__prompts=("a red circle",))


def records(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Counts are equal, losses within 1e-5, norms within 1e-4."""
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            rel = {int: 0.0, float: 1e-4 if key == "grad_norm" else 1e-5}[type(value)]
            assert mine[key] == pytest.approx(value, rel=rel, abs=0), (theirs["step"], key)


def test_the_uncut_run_is_worth_comparing_with(uncut: Path) -> None:
    lines = records(uncut)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["lr"] for line in lines] == [0.0, 2.5e-3, *[5e-3] * 4]
    assert lines[-1]["loss"] < lines[0]["loss"] and len({line["loss"] for line in lines}) == STEPS
    sources = {key for line in lines for key in line if "/" in key}
    assert sources == {
        *("loss_mse/draw", "loss_ce/caption", "loss_ce/edit", "loss_mse/edit", "loss_mse/clips", "loss_ce/notes")
    }
    assert checkpoints(uncut) == ["latest", "step_00000004", "step_00000006"]
    assert (uncut / "checkpoints/latest").read_text() == "step_00000006"


def test_a_record_adds_up(uncut: Path) -> None:
    for line in records(uncut):
        assert line["loss"] == pytest.approx(0.25 * line["loss_ce"] + line["loss_mse"], rel=1e-12)
        assert line["tokens"] == line["tokens_und"] + line["tokens_gen"]


def test_a_cut_run_goes_on_bit_for_bit(bench: Bench, uncut: Path) -> None:
    options = {"telemetry__sample_every": STEPS, "telemetry__prompts": ("a red circle",)}
    folder = bench.run("cut", cut=CUT, **options)
    assert records(folder) == records(uncut)[:CUT]
    assert checkpoints(folder) == ["latest", "step_00000002", "step_00000004"]
    assert (folder / "checkpoints/latest").read_text() == "step_00000004"
    bench.run("cut", **options)
    assert bench.begun == [4, 5]
    assert records(folder) == records(uncut)
    assert checkpoints(folder) == checkpoints(uncut)
    assert (folder / "checkpoints/latest").read_text() == "step_00000006"
    picture = "samples/step_00000006.png"
    assert (folder / picture).read_bytes() == (uncut / picture).read_bytes()


def test_a_finished_run_can_be_prolonged(bench: Bench, uncut: Path) -> None:
    folder = bench.run("prolonged", train__steps=3)
    assert checkpoints(folder) == ["latest", "step_00000002", "step_00000003"]
    bench.run("prolonged", train__steps=3)
    assert bench.begun == [] and records(folder) == records(uncut)[:3]
    bench.run("prolonged")
    assert bench.begun == [3, 4, 5]
    assert records(folder) == records(uncut)


@pytest.mark.parametrize(("precision", "grid"), [("fp32", (1, 1, 1, 1, 2)), ("bf16", (1, 1, 1, 1, 1))])
def test_a_cut_run_goes_on_bit_for_bit_elsewhere(bench: Bench, uncut: Path, precision: str, grid: Grid) -> None:
    """On two data-parallel ranks; and in bf16, where the model holds rounded copies of the weights that are saved."""
    whole = bench.run(f"whole-{precision}", grid, train__precision=precision)
    assert records(whole) != records(uncut)
    if precision == "fp32":
        assert_close(records(whole), records(uncut))
    folder = bench.run(f"cut-{precision}", grid, cut=CUT, train__precision=precision)
    bench.run(f"cut-{precision}", grid, train__precision=precision)
    assert bench.begun == [4, 5] and records(folder) == records(whole)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1, 1, 1, 1), (2, 1, 1, 1, 1)), ((1, 2, 1, 1, 1), (1, 1, 1, 1, 2))], ids=str
)
def test_a_cut_run_goes_on_on_another_grid(bench: Bench, uncut: Path, before: Grid, after: Grid) -> None:
    name = f"{before}-{after}"
    folder = bench.run(name, before, cut=CUT)
    bench.run(name, after)
    assert bench.begun == [4, 5]
    assert_close(records(folder), records(uncut))


def test_keep_0_keeps_all_and_a_checkpoint_can_be_named(bench: Bench, uncut: Path) -> None:
    folder = bench.run("all", checkpoint__keep=0)
    assert checkpoints(folder) == ["latest", "step_00000002", "step_00000004", "step_00000006"]
    assert records(folder) == records(uncut)
    other = bench.run("branch", run__resume=str(folder / "checkpoints/step_00000002"), checkpoint__every=0)
    assert bench.begun == [2, 3, 4, 5] and records(other) == records(uncut)[2:]
    assert checkpoints(other) == ["latest", "step_00000006"]


def test_resume_none_starts_over(bench: Bench, uncut: Path) -> None:
    """The same run again, shorter: the checkpoints of the longer one before it do not get in its way."""
    folder = bench.run("over")
    bench.run("over", run__resume="none", train__steps=3)
    assert bench.begun == [0, 1, 2] and records(folder) == records(uncut)[:3]
    latest = (folder / "checkpoints/latest").read_text()
    assert latest == "step_00000003" and (folder / "checkpoints" / latest / "manifest.json").is_file()
    bench.run("over")
    assert bench.begun == [3, 4, 5] and records(folder) == records(uncut)


def test_only_a_fresh_start_draws_weights(ranks: RankPool, shapes: Path, tmp_path: Path) -> None:
    config = change(small_config(shapes, tmp_path / "one"), {"train.steps": 1})
    assert ranks.run(1, tensors_drawn, config)[0] > 20
    assert ranks.run(1, tensors_drawn, change(config, {"train.steps": 2})) == [0]
    stage = {"run.dir": str(tmp_path / "two"), "run.init_from": str(tmp_path / "one/checkpoints/step_00000002")}
    assert ranks.run(1, tensors_drawn, change(config, stage)) == [0]
    assert all(math.isfinite(line["loss"]) for line in records(tmp_path / "two"))


def test_frozen_weights_come_back_too(bench: Bench) -> None:
    """They are no one's shard; in bf16 the model's own copy is all there is of them."""
    options = {"train__precision": "bf16", "train__freeze": ("vit", "latent")}
    whole = bench.run("frozen", **options)
    folder = bench.run("frozen-cut", cut=CUT, **options)
    bench.run("frozen-cut", **options)
    assert bench.begun == [4, 5] and records(folder) == records(whole)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__ffn": 64}, "model.ffn=64, but .* was trained with 48"),
        ({"data__root": "/typo", "run__resume": "none"}, "/typo"),
        ({"parallel__attention": "triton", "run__resume": "none"}, "parallel.attention=triton"),
    ],
)
def test_a_start_that_is_refused_changes_nothing(bench: Bench, changes: dict[str, Any], said: str) -> None:
    folder = bench.run("refused", train__steps=2)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(RankError, match=f"UserError.*{said}"):
        bench.run("refused", train__steps=2, **changes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(folder.glob("checkpoints-*"))


def damage_an_image(config: Config) -> None:
    """Overwrite the image of the first sample of `draw` in the first step, unseen by the index."""
    sources = sources_of(config)
    plan = GlobalPlan(sources, config).next_step()
    key = next(visit.key for pack in plan.packs for visit in pack.visits if visit.key.source == "draw")
    index = next(source.index for source in sources if source.name == key.source)
    shard, member = index.reader.shards[0], index.documents[key.sample].images[0].member
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    with shard.open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    os.utime(shard, ns=times)


def test_a_lost_image_costs_its_loss_alone(bench: Bench, uncut: Path, tmp_path: Path) -> None:
    """Damaged after it was indexed: it is counted, no NaN comes of it, and the run goes on."""
    own = Path(shutil.copytree(bench.shapes, tmp_path / "shapes", copy_function=shutil.copy2))
    damage_an_image(small_config(own))
    folder = bench.run("lost", data__root=str(own))
    lines, expected = records(folder), records(uncut)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0]["lost_images"] == 1 and expected[-1]["lost_images"] == 0
    assert all(math.isfinite(value) for line in lines for value in line.values())
    others = ("loss_ce", "loss_ce/caption", "loss_mse/clips", "loss_mse/edit")
    assert [lines[0][key] for key in others] == pytest.approx([expected[0][key] for key in others], rel=1e-6)
    assert lines[0]["loss_mse/draw"] < 0.95 * expected[0]["loss_mse/draw"]
