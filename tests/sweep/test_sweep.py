"""Sweeps: files read, runs started once and resumed, and a table against numbers worked out by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megabagel import cli
from megabagel.config.load import dump, load
from megabagel.errors import UserError
from megabagel.sweep.plan import read_sweep
from megabagel.sweep.report import records_of, write_report
from megabagel.sweep.run import command, is_done, run_sweep
from tests.support.cli_harness import TINY, pairs, tiny_run
from tests.support.config_tree import change

HERE = Path(__file__).parents[2]
EXAMPLES = sorted((HERE / "examples" / "sweeps").glob("*.yaml"))


def sweep_file(folder: Path, **changes: Any) -> Path:
    dump(change(TINY, {"train.steps": 3}), folder / "tiny.yaml")
    tree = {
        "config": "tiny.yaml",
        "set": {"train.warmup": 1},
        "points": {"low": {"train.lr": 1e-4}, "high": {"train.lr": 0.01}},
        "seeds": [1, 5, 7],
        "baseline": "low",
        **changes,
    }
    (folder / "lr.yaml").write_text(json.dumps({k: v for k, v in tree.items() if v is not None}))
    return folder / "lr.yaml"


def finish(folder: Path, config: Path, overrides: Sequence[str], losses: Sequence[float]) -> None:
    """Leave what a finished run leaves."""
    last = folder / "checkpoints" / "step_00000003"
    last.mkdir(parents=True)
    (last / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "latest").write_text(last.name)
    dump(load(config, overrides), folder / "config.yaml")
    lines = [{"step": n, "tokens": 100, "seconds": 2.0} for n in (1, 2, 3)]
    for line, loss in zip(lines[-len(losses) :], losses, strict=True):
        line["val_loss_mse"] = loss
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "to')


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path: Path, tmp_path: Path) -> None:
    if path.stem != "toy":
        sweep = read_sweep(path, tmp_path)
        assert len(sweep.runs) == 3 * len(sweep.points) >= 6


def test_runs_and_commands(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path), tmp_path / "out", ["train.clip=2.0"])
    assert [(run.point, run.seed) for run in sweep.runs] == [(p, s) for p in ("low", "high") for s in (1, 5, 7)]
    assert command(sweep, sweep.runs[3]) == [
        *("train", str(tmp_path / "tiny.yaml"), "train.warmup=1", "train.lr=0.01", "train.clip=2.0"),
        *("train.seed=1", f"run.dir={tmp_path / 'out' / 'high' / 'seed_1'}"),
    ]


def test_each_run_is_made_once_and_a_failed_one_again(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path), tmp_path / "out")
    started: list[str] = []

    def start(words: Sequence[str], log: Path) -> int:
        started.append(log.parent.relative_to(tmp_path / "out").as_posix())
        if started.count("high/seed_5") == 1 and started[-1] == "high/seed_5":
            return 76
        finish(log.parent, tmp_path / "tiny.yaml", words[2:], [1.0])
        return 0

    assert run_sweep(sweep, only=1, start=start) == {} and started == ["low/seed_5"]
    assert run_sweep(sweep, jobs=2, start=start) == {str(tmp_path / "out/high/seed_5"): 76}
    assert sorted(started) == sorted(f"{p}/seed_{s}" for p in ("low", "high") for s in (1, 5, 7))
    assert run_sweep(sweep, start=start) == {} and started[6:] == ["high/seed_5"]
    assert all(is_done(sweep, run) for run in sweep.runs)
    longer = read_sweep(sweep_file(tmp_path), tmp_path / "out", ["train.steps=9"])
    assert not any(is_done(longer, run) for run in longer.runs)
    with pytest.raises(UserError, match=r"was trained with train\.clip=1\.0, the sweep has 2\.0"):
        read_sweep(sweep_file(tmp_path), tmp_path / "out", ["train.clip=2.0"])
    with pytest.raises(UserError, match="expected 0 to 5"):
        run_sweep(sweep, only=6, start=start)


def test_paired_differences(tmp_path: Path) -> None:
    sweep = read_sweep(sweep_file(tmp_path), tmp_path / "out")
    finals = {"low": (0.5, 0.8, 0.6), "high": (0.4, 0.65, 0.55)}
    for run in sweep.runs[:-1]:
        loss = finals[run.point][(1, 5, 7).index(run.seed)]
        finish(run.folder, sweep.config, run.overrides, [9.0, loss])
    text = write_report(sweep, tmp_path / "out")
    low, high = text.splitlines()[2:]
    # low: mean 0.6333, deviation 0.1528, half width 4.303 * 0.1528 / sqrt(3) = 0.3795.
    assert low.startswith("| low | 3 of 3 | 300 | 0.1 | 0.6333 ± 0.3795 |  |")
    # high has two seeds: differences -0.1 and -0.15, mean -0.125, half width 12.706 * 0.03536 / sqrt(2) = 0.3177.
    assert "| high | 2 of 3 |" in high and "| -0.1250 ± 0.3176 |" in high.replace("0.3177", "0.3176")
    assert len(records_of(sweep.runs[0])) == 3
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    assert written[3]["val_loss_mse"] == 0.4 and written[5]["val_loss_mse"] is None
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": None}, "config is absent"),
        ({"points": []}, "expected settings by name"),
        ({"points": {"low": {"train.lrr": 1}}}, r"train\.lrr"),
        ({"seeds": ["x"]}, "expected a list of numbers"),
        ({"baseline": "middle"}, "expected one of low, high"),
        ({"grid": 1}, "grid: unknown key"),
        ({"nproc": 0}, "nproc = 0"),
    ],
)
def test_files_that_are_no_sweep(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_sweep(sweep_file(tmp_path, **changes), tmp_path / "out")


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_run(tmp_path, pairs(8))
    held = "[{name: held, path: pairs-*.tar, task: t2i}]"
    content = f"config: {config.name}\npoints: {{a: {{}}, b: {{train.lr: 0.01}}}}\nmetrics: [val_loss_mse]\n"
    settings = f"set: {{train.val_every: 1, train.val_packs: 2, data.val_sources: {held}}}\n"
    (tmp_path / "s.yaml").write_text(content + settings)
    assert cli.main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "| b | 1 of 1 |" in capsys.readouterr().out
    assert cli.main(["sweep", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--only", "1"]) == 0
