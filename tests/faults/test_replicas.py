"""Planted corruption in real runs: found before the checkpoint is written, named by tensor and rank."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megabagel.config.schema import Config, TelemetryConfig
from megabagel.train import replicas, stragglers
from megabagel.train.replicas import fingerprint
from tests.support.config_tree import change
from tests.support.grid_run import on_grid
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config
from tests.train.test_resume import TIMED

SAVED = 4
"""Step after which a value is changed, before the checkpoint of this step. There is one every two steps."""

Plant = Callable[[Any], torch.Tensor]
"""Returns the tensor of a trainer in which one bit is flipped."""


def flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the last element."""
    last = tensor.detach().view(-1)[-1:]
    last.view({2: torch.int16, 4: torch.int32}[last.element_size()]).bitwise_xor_(1)


def norm_weight(trainer: Any) -> torch.Tensor:
    """Weight of a norm: replicated over tensor-parallel ranks."""
    return named(trainer)["layers.0.input_norm.und.weight"]


def qkv_weight(trainer: Any) -> torch.Tensor:
    """Weight of a column-parallel linear: split over tensor-parallel ranks, copied over data-parallel ones."""
    return named(trainer)["layers.1.attention.gen.qkv.weight"]


def average(trainer: Any) -> torch.Tensor:
    """Average of the weight of a norm."""
    from megabagel.checkpoint.tensors import optimizer_shards

    wanted = norm_weight(trainer)
    shards = optimizer_shards(trainer.optimizer.distributed, trainer.optimizer.ema)
    return next(shard.states["ema"] for shard in shards if shard.parameter is wanted)


def named(trainer: Any) -> dict[str, torch.Tensor]:
    """Parameters of this rank by name."""
    return dict(item for chunk in trainer.optimizer.chunks for item in chunk.module.model.named_parameters())


def train(config: Config, plant: str | None, on: int) -> str:
    """Run the program on this rank; returns the message that it ended with. `plant` names what is changed on `on`."""
    import torch.distributed as dist

    from megabagel.errors import Stopped
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train import run
    from megabagel.train.step import StepRunner

    train_step, unreduced = run.Trainer.train_step, StepRunner.unreduced
    passes: list[bool] = []
    planted: list[bool] = []

    @contextmanager
    def here(config: Config) -> Iterator[mesh.Mesh]:
        cpu_backend.install()
        yield mesh.build(config)

    def changed(trainer: Any, step: Any) -> Any:
        if plant == "slow" and dist.get_rank() == on:
            build = trainer.builder.build

            def slow(batch: Any) -> Any:
                time.sleep(0.1)
                return build(batch)

            with mock.patch.object(trainer.builder, "build", slow):
                return train_step(trainer, step)
        result = train_step(trainer, step)
        if plant in PLANTS and not planted and trainer.step == SAVED and dist.get_rank() == on:
            planted.append(True)  # a rollback takes the step twice
            flip(PLANTS[plant](trainer))
        return result

    def faulty(runner: Any, *args: Any) -> Any:
        sums = unreduced(runner, *args)
        passes.append(True)
        if plant == "gradient" and dist.get_rank() == on and len(passes) == 4:
            flip(dict(runner.optimizer.chunks[0].module.model.named_parameters())["heads.norm.und.weight"].main_grad)
        return sums

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(run, "distributed", here))
        patches.enter_context(mock.patch.object(run.Trainer, "train_step", changed))
        patches.enter_context(mock.patch.object(StepRunner, "unreduced", faulty))
        try:
            run.main(config)
        except Stopped as error:
            return f"{error.code}: {error}"
    return ""


PLANTS: dict[str, Plant] = {"norm": norm_weight, "qkv": qkv_weight, "average": average}


class Runs:
    """Starts runs, each in a folder of its own."""

    def __init__(self, ranks: RankPool, shapes: Path, root: Path) -> None:
        self.ranks, self.shapes, self.root = ranks, shapes, root

    def run(self, name: str, world: int, tp: int, plant: str | None = None, on: int = 1, **changes: Any) -> str:
        """Message that all ranks ended with. `changes`: of the config; pp and vpp are the grid's."""
        pp, vpp = changes.pop("pp", 1), changes.pop("vpp", 1)
        config = small_config(self.shapes, self.root / name)
        config = change(config, {"checkpoint.every": 2, "checkpoint.keep": 0, "checkpoint.async_save": False})
        config = change(config, {key.replace("__", "."): value for key, value in changes.items()})
        (message,) = set(self.ranks.run(world, train, on_grid(config, tp, pp, vpp, 1), plant, on))
        return message

    def saved(self, name: str) -> list[int]:
        return sorted(int(path.name[5:]) for path in (self.root / name / "checkpoints").glob("step_*"))

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def numbers(self, name: str) -> list[dict[str, Any]]:
        """Records without what depends on the machine."""
        return [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in self.records(name)]


@pytest.fixture(scope="module")
def runs(ranks: RankPool, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(ranks, shapes, tmp_path_factory.mktemp("replicas"))


@pytest.mark.parametrize(
    "plant, world, tp, text",
    [
        ("norm", 2, 2, "layers.0.input_norm.und.weight differs between ranks 0, 1"),
        ("average", 2, 2, "ema of layers.0.input_norm.und.weight differs between ranks 0, 1"),
        ("qkv", 2, 1, "layers.1.attention.gen.qkv.weight differs between ranks 0, 1"),
        ("qkv", 4, 1, "layers.1.attention.gen.qkv.weight on rank 2 differs from the 3 other copies"),
    ],
)
def test_a_changed_bit_is_found_before_the_checkpoint(runs: Runs, plant: str, world: int, tp: int, text: str) -> None:
    name = f"{plant}-{world}"
    message = runs.run(name, world, tp, plant, on=world // 2)
    assert message.startswith(f"79: step {SAVED}: {text}"), message
    assert f"rank {world // 2} is on " in message and "step_00000002 is from before" in message
    assert runs.saved(name) == [2], "nothing is saved of such a state"


@pytest.mark.parametrize("precision, world, tp", [("bf16", 2, 2), ("fp32", 4, 2)])
def test_no_false_alarm(runs: Runs, precision: str, world: int, tp: int) -> None:
    name = f"clean-{precision}"
    assert runs.run(name, world, tp, train__precision=precision, train__freeze=("vit",)) == ""
    assert runs.saved(name) == [2, 4, 6]


def test_rollback_goes_on_from_the_last_good_checkpoint(runs: Runs) -> None:
    assert runs.run("back", 2, 2, "norm", train__on_corruption="rollback") == ""
    assert runs.saved("back") == [2, 4, 6]
    found = runs.numbers("back")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert runs.run("undisturbed", 2, 2) == ""
    assert found[:2] == runs.numbers("undisturbed")[:2]
    assert [record["updates"] for record in found] == [1, 2, 3, 4, 5, 6]


def test_nothing_to_roll_back_to(runs: Runs) -> None:
    message = runs.run("early", 2, 2, "norm", train__on_corruption="rollback", checkpoint__every=SAVED)
    assert message.startswith("79: ") and "there is no checkpoint yet, so the run cannot roll back" in message


def test_recomputation_names_the_rank_that_differs(runs: Runs) -> None:
    """The second pass of the second check, in step 4, differs on rank 1. The update is not made."""
    message = runs.run("gradient", 2, 1, "gradient", train__recompute_check_every=2)
    text = "a micro-batch computed twice on rank 1 differs in the gradient of heads.norm.und.weight (rank 1 is on "
    assert message.startswith(f"79: step 4: {text}"), message
    assert runs.saved("gradient") == [2] and [record["step"] for record in runs.numbers("gradient")] == [1, 2, 3]


def test_recomputation_changes_no_bit(runs: Runs) -> None:
    """On pipeline stages, interleaved: a check is a round of micro-batches there."""
    stages: dict[str, Any] = {"pp": 2, "vpp": 2, "model__layers": 4}
    assert runs.run("checked", 2, 1, train__recompute_check_every=1, **stages) == ""
    assert runs.run("unchecked", 2, 1, **stages) == ""
    assert runs.numbers("checked") == runs.numbers("unchecked")


def test_the_slow_rank_is_on_record(runs: Runs) -> None:
    assert runs.run("slow", 2, 1, "slow", train__steps=3, checkpoint__every=0) == ""
    for record in runs.records("slow")[1:]:
        assert record["slowest_rank"] == 1
        assert 0.2 < record["rank_seconds_max"] <= record["seconds"] + record["data_wait"]
        assert record["rank_seconds_max"] / 2 <= record["rank_seconds_mean"] < record["rank_seconds_max"]


def watch(places: list[tuple[int, str]], **options: Any) -> stragglers.StragglerWatch:
    """A watch over ranks at these (stage, host)."""
    mesh = mock.Mock()
    with mock.patch.object(stragglers, "all_gathered", lambda mine: [list(place) for place in places]):
        return stragglers.StragglerWatch(TelemetryConfig(**options), mesh)


def test_a_straggler_is_named_after_n_steps(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 2 is 25 % slower than the others of its stage; ranks 3 and 4, of a stage with more work, are not."""
    seen = watch([(0, "a"), (0, "a"), (0, "b"), (1, "b"), (1, "c")], straggler_steps=4)
    for step in range(1, 4):
        seen.add(step, [1.0, 1.1, 1.25 + (step % 2) * 0.02, 2.0, 2.1])
    assert not caplog.records
    seen.add(4, [1.0, 1.1, 1.35, 2.0, 2.1])
    (record,) = caplog.records
    assert record.getMessage().startswith("steps 1 to 4: rank 2 on b is slow, 1.285 s a step of its own")
    assert "stage is 1.050 s" in record.getMessage()
    for step in range(5, 9):
        seen.add(step, [1.0, 1.1, 1.2, 2.0, 2.1])
    assert len(caplog.records) == 1, "20 % above the median of its stage would be 1.26 s"


def test_one_slow_step_is_no_straggler(caplog: pytest.LogCaptureFixture) -> None:
    seen, none = (watch([(0, "a")] * 2, straggler_steps=steps) for steps in (10, 0))
    for step in range(1, 11):
        seen.add(step, [1.0, 2.5 if step == 3 else 1.0])
        none.add(step, [1.0, 9.0])
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_fingerprint_sees_every_bit_of_every_element(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replicas, "_CHUNK", 8)  # three chunks, the last of 3 elements
    tensor = torch.linspace(-1, 1, 19).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    seen = {int(fingerprint(tensor))}
    for place in range(len(tensor)):
        for bit in range(8 * tensor.element_size()):
            other = tensor.clone()
            other.view(integer)[place] ^= 1 << bit if bit < 8 * tensor.element_size() - 1 else torch.iinfo(integer).min
            seen.add(int(fingerprint(other)))
    assert len(seen) == 1 + 19 * 8 * tensor.element_size()


def test_a_fingerprint_is_of_the_values_in_their_order() -> None:
    tensor = torch.arange(12.0).view(3, 4)
    assert fingerprint(tensor) == fingerprint(tensor.t().contiguous().t()), "not of strides"
    assert fingerprint(tensor) != fingerprint(tensor.flip(0))
    assert fingerprint(torch.zeros(3)) != fingerprint(-torch.zeros(3))
    # By the definition, in Python's integers.
    golden = 0x9E3779B97F4A7C15
    total = 0
    for place, value in enumerate([7, -3, 2**30], 1):
        spread = place * golden % 2**64
        signed = spread - 2**64 if spread >= 2**63 else spread
        total += value * ((((spread ^ (signed >> 29)) * golden) % 2**64) | 1)
    assert int(fingerprint(torch.tensor([7, -3, 2**30], dtype=torch.int32))) % 2**64 == total % 2**64
