"""The command line: words in any order, mistakes without tracebacks, nothing heavy before it is needed."""

import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from megabagel import cli
from megabagel.config.load import dump
from megabagel.config.schema import Config
from megabagel.errors import Preempted, UserError
from tests.support.config_tree import VALID, change

HERE = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def not_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may be a rank of something."""
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def valid(tmp_path: Path) -> str:
    dump(change(VALID, {"train.packs_per_step": 6}), tmp_path / "valid.yaml")
    return str(tmp_path / "valid.yaml")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configs that training was started with, instead of training."""
    started: list[Config] = []
    module = types.ModuleType("megabagel.train.run")
    module.main = lambda config, stop, sampler: started.append(config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megabagel.train.run", module)
    return started


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], int]]:
    """Commands that were spawned, instead of processes."""
    calls: list[tuple[list[str], int]] = []

    def spawn(command: list[str], nproc: int) -> int:
        calls.append((command, nproc))
        return 9

    monkeypatch.setattr("megabagel.commands.train.spawn", spawn)
    return calls


def megabagel(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "megabagel", *words], capture_output=True, text=True, cwd=HERE)


def test_train_runs_alone(valid: str, runs: list[Config]) -> None:
    assert cli.main(["train", valid, "train.steps=3", "train.lr=1e-4"]) == 0
    assert [(config.train.steps, config.train.lr) for config in runs] == [(3, 1e-4)]


ORDERS = [
    ["CONFIG", "train.steps=3", "--nproc", "2", "parallel.tp=2"],
    ["CONFIG", "--nproc", "2", "train.steps=3", "parallel.tp=2"],
    ["--nproc", "2", "CONFIG", "train.steps=3", "parallel.tp=2"],
    ["--nproc=2", "CONFIG", "train.steps=3", "parallel.tp=2"],
    ["CONFIG", "train.steps=3", "parallel.tp=2", "--nproc", "2"],
]


@pytest.mark.parametrize("words", ORDERS, ids=" ".join)
def test_options_and_overrides_in_any_order(
    valid: str, words: list[str], spawned: list[tuple[list[str], int]], runs: list[Config]
) -> None:
    assert cli.main(["train", *(valid if word == "CONFIG" else word for word in words)]) == 9
    command = [sys.executable, "-m", "megabagel", "train", valid, "train.steps=3", "parallel.tp=2"]
    assert spawned == [(command, 2)]
    assert runs == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.hiden=3", "train.setps=4"], "model.hidden"),
        (["parallel.cp=3"], "world size = 2, parallel.tp = 1, parallel.pp = 1, parallel.cp = 3"),
        (["train.packs_per_step=5"], "train.packs_per_step = 5"),
    ],
)
def test_mistakes_are_told_before_anything_is_spawned(
    valid: str,
    words: list[str],
    message: str,
    spawned: list[tuple[list[str], int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["train", valid, *words, "--nproc", "2"]) == 2
    assert spawned == []
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("megabagel: error: ")
    assert message in err


@pytest.mark.parametrize(
    ("env", "refused"),
    [
        ({"RANK": "0"}, "RANK = 0"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, "SLURM_PROCID = 3 of 8 tasks"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_PROCID": "0"}, None),  # a batch script, which may well start ranks on its node
        ({}, None),
    ],
)
def test_ranks_do_not_start_ranks(
    valid: str,
    env: dict[str, str],
    refused: str | None,
    spawned: list[tuple[list[str], int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", valid, "--nproc", "2"]) == (2 if refused else 9)
    assert bool(spawned) == (refused is None)
    assert (refused or "") in capsys.readouterr().err


def test_a_rank_of_another_launcher_trains(valid: str, runs: list[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", valid]) == 0
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("a.tar: empty; expected a tar"), 2, "megabagel: error: a.tar: empty; expected a tar\n"),
        (Preempted("saved; start again"), 75, "megabagel: stopped: saved; start again\n"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_how_a_command_ends(
    valid: str, runs: Any, error: BaseException, code: int, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    sys.modules["megabagel.train.run"].main = fail  # type: ignore[attr-defined]
    assert cli.main(["train", valid]) == code
    err = capsys.readouterr().err
    assert err == text if text else err.startswith("megabagel: stopped: Ctrl-C after step ") and err.count("\n") == 1


def test_our_own_errors_keep_their_traceback(valid: str, runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    sys.modules["megabagel.train.run"].main = fail  # type: ignore[attr-defined]
    assert cli.main(["train", valid]) == 1
    assert "Traceback" in (err := capsys.readouterr().err) and "ZeroDivisionError" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: CONFIG"),
        (["train", "c.yaml", "--nprocs", "2"], "unrecognized arguments: --nprocs"),
        (["train", "c.yaml", "--nproc", "0"], "expected an integer of at least 1, found '0'"),
        (["train", "c.yaml", "--nproc", "two"], "found 'two'"),
        (["data"], "required: COMMAND"),
        (["data", "prepare", "images"], "required: OUT"),
        (["data", "prepare", "images", "out", "more"], "unrecognized arguments: more"),
    ],
    ids=str,
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"samples_per_shard": 1000, "name": "shards", "kind": "captions"}),
        (
            ["--name", "stamps", "--samples-per-shard", "50", "--kind", "edits"],
            {"samples_per_shard": 50, "name": "stamps", "kind": "edits"},
        ),
    ],
)
def test_data_prepare(
    options: list[str],
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def prepare(images: Path, out: Path, **options: Any) -> types.SimpleNamespace:
        assert (images, out, options) == (Path("images"), Path("out"), expected)
        return types.SimpleNamespace(text=lambda everything: "12 samples")

    module = types.ModuleType("megabagel.data.builders.prepare")
    module.prepare = prepare  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megabagel.data.builders.prepare", module)
    assert cli.main(["data", "prepare", "images", *options, "out"]) == 0
    assert capsys.readouterr().out == "12 samples\n"


# In processes of their own


def test_help_and_mistakes_import_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom megabagel.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit(', '.join({'torch', 'numpy', 'megatron', 'PIL'} & set(sys.modules)) or 0)"
    )
    for words in (
        ["--help"],
        ["train", "--help"],
        ["data", "prepare", "--help"],
        ["train", str(tmp_path / "gone.yaml")],
    ):
        result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=HERE)
        assert result.returncode == 0, result.stderr


def test_as_a_module(valid: str) -> None:
    result = megabagel("train", "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--nproc N" in result.stdout
    result = megabagel("train", valid, "model.hiden=3", "--nproc", "3")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"megabagel: error: {valid}: 1 problem in the configuration",
        "  model.hiden = 3: unknown key; did you mean model.hidden? (command line)",
    ]


def test_a_missing_config_is_one_line() -> None:
    result = megabagel("train", "gone.yaml", "--nproc", "2")
    assert result.returncode == 2
    expected = "gone.yaml: cannot read the config: No such file or directory; expected a YAML file"
    assert result.stderr == f"megabagel: error: {expected}\n"
