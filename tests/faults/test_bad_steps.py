"""Faulty steps in real runs: what each policy leaves of weights, moments, averages, counters, data and records."""

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megabagel.config.schema import Config
from megabagel.data.plan.global_plan import GlobalPlan
from tests.support.config_tree import change
from tests.support.grid_run import on_grid
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config, sources_of
from tests.train.test_resume import TIMED

STEPS = 7
BAD = 5
"""Data step, counted from 1, whose loss is not a number. A checkpoint is written every two steps."""

State = dict[str, Any]
"""Bytes of weights, moments, averages and counters by name."""


def train(config: Config, bad: tuple[int, ...] = (), drop: int = 0, cut: int = 0) -> tuple[list[State], str]:
    """The program on this rank: its state after every step, and the message that it ended with.

    bad: data steps whose loss reads NaN. drop: data step that is left out. cut: data step that is not reached.
    """
    from megabagel.data.load.loader import Loader
    from megabagel.errors import Stopped
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.train import run
    from megabagel.train.anomaly import LossSpikeDetector

    train_step, steps, check = run.Trainer.train_step, Loader.steps, LossSpikeDetector.check
    states: list[State] = []
    now = [0]

    @contextmanager
    def here(config: Config) -> Iterator[mesh.Mesh]:
        cpu_backend.install()
        yield mesh.build(config)

    def fewer(loader: Any, count: int) -> Iterator[Any]:
        for step in steps(loader, count + bool(drop)):
            if step.plan.number + 1 == cut:
                raise KeyboardInterrupt
            if step.plan.number + 1 != drop:
                yield step

    def watched(trainer: run.Trainer, step: Any) -> Any:
        now[0] = step.plan.number + 1
        try:
            return train_step(trainer, step)
        finally:
            states.append(state_of(trainer))

    def misread(self: LossSpikeDetector, step: int, loss: float, norm: float) -> Any:
        return check(self, step, math.nan if now[0] in bad else loss, norm)

    said = ""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(run, "distributed", here))
        patches.enter_context(mock.patch.object(run.Trainer, "train_step", watched))
        patches.enter_context(mock.patch.object(Loader, "steps", fewer))
        patches.enter_context(mock.patch.object(LossSpikeDetector, "check", misread))
        try:
            run.main(config)
        except Stopped as error:
            said = str(error)
        except KeyboardInterrupt:
            assert cut
    return states, said


def state_of(trainer: Any) -> State:
    """Bytes of all that a step may change."""
    optimizer = trainer.optimizer
    found: State = {"updates": trainer.updates}
    for number, shard in enumerate(optimizer.shards()):
        found[f"weight/{number}"] = shard.detach().numpy().tobytes()
        found[f"ema/{number}"] = optimizer.ema[shard].numpy().tobytes()
        for kind, moment in optimizer.inner.state[shard].items():
            found[f"{kind}/{number}"] = moment.numpy().tobytes()
    for chunk in optimizer.chunks:
        for name, parameter in chunk.module.named_parameters():
            found[f"model/{name}"] = parameter.detach().numpy().tobytes()
    return found


class Bench:
    """Starts runs, each in a folder of its own."""

    def __init__(self, ranks: RankPool, shapes: Path, root: Path) -> None:
        self.ranks, self.shapes, self.root = ranks, shapes, root

    def config(self, name: str, **changes: Any) -> Config:
        config = small_config(self.shapes, self.root / name)
        config = change(config, {"train.steps": STEPS, "checkpoint.every": 2, "checkpoint.keep": 0})
        config = change(config, {"checkpoint.async_save": False})  # complete when the run is cut
        return change(config, {key.replace("__", "."): value for key, value in changes.items()})

    def run(self, name: str, how: dict[str, Any] | None = None, **changes: Any) -> tuple[list[State], str]:
        """Run on two data-parallel ranks; what rank 0 saw, once both said the same."""
        results = self.ranks.run(2, _train, on_grid(self.config(name, **changes), 1, 1, 1, 1), how or {})
        assert results[0][1] == results[1][1]
        return results[0]

    def records(self, name: str) -> list[dict[str, Any]]:
        lines = (self.root / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines]


def _train(config: Config, how: dict[str, Any]) -> tuple[list[State], str]:
    return train(config, **how)


@pytest.fixture(scope="module")
def bench(ranks: RankPool, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, shapes, tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def plain(bench: Bench) -> list[State]:
    """A run without faults."""
    states, said = bench.run("plain")
    assert not said and len(states) == STEPS
    return states


def test_stop_leaves_the_last_checkpoint_and_names_the_samples(bench: Bench, plain: list[State]) -> None:
    states, said = bench.run("stop", {"bad": (BAD,)})
    folder = bench.root / "stop"
    assert f"step {BAD}: loss is nan. No update was made" in said and f"{folder}/faults/step_{BAD:08d}.json" in said
    assert states[:-1] == plain[: BAD - 1] and states[-1] == states[-2]
    assert bench.records("stop") == bench.records("plain")[: BAD - 1]
    assert [path.name for path in sorted((folder / "checkpoints").glob("step_*"))] == ["step_00000002", "step_00000004"]


def test_what_is_written_out_is_the_faulty_step(bench: Bench, plain: list[State]) -> None:
    bench.run("dumped", {"bad": (BAD,)})
    config = bench.config("dumped")
    plan = GlobalPlan(sources_of(config), config)
    expected = [plan.next_step() for _ in range(BAD)][-1]
    written = json.loads((bench.root / "dumped" / "faults" / f"step_{BAD:08d}.json").read_text())
    assert (written["step"], written["what"], written["action"]) == (BAD, "loss is nan", "stop")
    packs = [pack for turn in written["micro_steps"] for pack in turn["packs"]]
    found = sorted((s["source"], s["sample"], s["epoch"], s["tokens"]) for pack in packs for s in pack)
    visits = [visit for pack in expected.packs for visit in pack.visits]
    assert found == sorted((v.key.source, v.key.sample, v.key.epoch, v.size.tokens) for v in visits)
    keys = {(s["source"], s["sample"]): (s["key"], s["file"]) for pack in packs for s in pack}
    for visit in visits:
        key, file = keys[visit.key.source, visit.key.sample]
        assert key == plan.document(visit.key).key
        assert file is None if visit.key.source == "notes" else Path(file).parent == bench.shapes
    assert f"run.resume={bench.root}/dumped/checkpoints/step_00000004" in written["replay"]
    record = bench.records("plain")[BAD - 1]
    assert sum(turn["mse_sum"] for turn in written["micro_steps"]) > 0
    assert written["grad_norm"] == record["grad_norm"], "the numbers are those of the step itself"


def test_the_replay_meets_the_same_step(bench: Bench) -> None:
    bench.run("replayed", {"bad": (BAD,)})
    written = json.loads((bench.root / "replayed" / "faults" / f"step_{BAD:08d}.json").read_text())
    words = dict(word.split("=", 1) for word in written["replay"].split()[3:])
    assert written["replay"].split()[:3] == ["megabagel", "train", f"{bench.root}/replayed/config.yaml"]
    changes = {key.replace(".", "__"): int(value) if value.isdigit() else value for key, value in words.items()}
    config = change(bench.config("replayed"), {key.replace("__", "."): value for key, value in changes.items()})
    (states, said), _ = bench.ranks.run(2, _train, on_grid(config, 1, 1, 1, 1), {"bad": (BAD,)})
    assert len(states) == 1 and f"step {BAD}: loss is nan" in said
    again = json.loads((Path(words["run.dir"]) / "faults" / f"step_{BAD:08d}.json").read_text())
    assert again["micro_steps"] == written["micro_steps"] and again["grad_norm"] == written["grad_norm"]


def test_skip_makes_no_update_and_goes_on(bench: Bench, plain: list[State]) -> None:
    states, said = bench.run("skip", {"bad": (BAD,)}, train__on_nonfinite="skip")
    assert not said and states[: BAD - 1] == plain[: BAD - 1]
    assert states[BAD - 1] == states[BAD - 2], "weights, moments, averages and counters are untouched"
    assert states[BAD] != states[BAD - 1]
    records = bench.records("skip")
    assert [line["step"] for line in records] == list(range(1, STEPS + 1))
    assert [line["updates"] for line in records] == [1, 2, 3, 4, 4, 5, 6]
    assert records[BAD - 1]["samples"] == bench.records("plain")[BAD - 1]["samples"], "the data goes on"
    assert records[BAD]["lr"] == bench.records("plain")[BAD]["lr"], "the schedule follows the steps"


def test_a_run_that_skipped_goes_on_bit_for_bit(bench: Bench) -> None:
    """AdamW corrects its bias by the number of updates, not of steps."""
    how = {"bad": (3,)}
    whole, _ = bench.run("whole", how, train__on_nonfinite="skip")
    bench.run("cut", {**how, "cut": 6}, train__on_nonfinite="skip")
    assert len(bench.records("cut")) == 5
    rest, _ = bench.run("cut", how, train__on_nonfinite="skip")
    assert rest == whole[4:] and bench.records("cut") == bench.records("whole")


def test_a_run_that_goes_on_remembers_what_is_usual(bench: Bench) -> None:
    """Any rise counts as a spike. Checked from step 4 on: without the memory of a checkpoint, from step 8 on."""
    options = {"train__on_spike": "skip", "train__spike_window": 3, "train__spike_sigma": 1e-9}
    options["train__spike_warmup"] = 0
    whole, _ = bench.run("usual", **options)
    bench.run("usual-cut", {"cut": 6}, **options)
    rest, _ = bench.run("usual-cut", **options)
    assert rest == whole[4:] and bench.records("usual-cut") == bench.records("usual")
    assert [line["updates"] for line in bench.records("usual")][4:] != [5, 6, 7], "something was skipped after step 4"


def test_rollback_goes_on_from_the_checkpoint_with_later_data(bench: Bench, plain: list[State]) -> None:
    """As a run that resumes from step 4 and never sees data step 5."""
    states, said = bench.run("back", {"bad": (BAD,)}, train__on_nonfinite="rollback")
    assert not said
    bench.run("reference", train__steps=4)
    expected, _ = bench.run("reference", {"drop": BAD})
    assert states[: BAD - 1] == plain[: BAD - 1] and states[BAD:] == expected
    assert bench.records("back") == bench.records("reference")
    assert [line["step"] for line in bench.records("back")] == list(range(1, STEPS + 1))


def test_a_run_that_rolled_back_goes_on_bit_for_bit(bench: Bench) -> None:
    """Cut after the rollback, before the next checkpoint: it meets the fault again, and rolls back again."""
    how = {"bad": (BAD,)}
    bench.run("back-whole", how, train__on_nonfinite="rollback")
    bench.run("back-cut", {**how, "cut": BAD + 2}, train__on_nonfinite="rollback")
    assert len(bench.records("back-cut")) == 5
    bench.run("back-cut", how, train__on_nonfinite="rollback")
    assert bench.records("back-cut") == bench.records("back-whole")


def test_rollbacks_are_bounded(bench: Bench) -> None:
    options = {"train__on_nonfinite": "rollback", "train__max_rollbacks": 2, "train__steps": 6}
    _, said = bench.run("bounded", {"bad": (5, 6, 7)}, **options)
    assert "step 5: loss is nan, and train.max_rollbacks=2 is reached" in said
    _, said = bench.run("early", {"bad": (2,)}, **options)
    assert "step 2: loss is nan, and there is no checkpoint yet" in said


def test_a_recorded_spike_changes_nothing(bench: Bench, plain: list[State]) -> None:
    states, said = bench.run("spike", train__spike_window=2, train__spike_sigma=1e-9, train__spike_warmup=0)
    assert not said and states == plain and bench.records("spike") == bench.records("plain")
    faults = [json.loads(path.read_text()) for path in (bench.root / "spike" / "faults").iterdir()]
    assert faults and all(" spike " in fault["what"] and fault["action"] == "record" for fault in faults)
