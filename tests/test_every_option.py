"""Every option through the program: `megabagel train` of tiny.yaml, two steps, with each value of each option.

Walks the schema, so that an option which is added later is run too. Values of options that are no numbers are all
tried; of numbers the ends of their ranges and the next neighbours of the default. A run either finishes or is refused
by one message that names the option. All runs share this process: starting one costs seconds, two steps do not.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from megabagel.cli import main
from megabagel.config.ranges import MOST, MOST_OF_ALL, RANGES
from megabagel.config.schema import Config, SourceConfig
from megabagel.errors import ERROR_PREFIX

CONFIG = Path(__file__).parents[1] / "examples" / "configs" / "tiny.yaml"

SMALL = (
    *("model.layers=2", "model.hidden=32", "model.ffn=32", "model.vit.layers=1", "model.vit.hidden=32"),
    *("model.vit.ffn=32", "data.min_tokens=100", "data.max_tokens=128", "data.lookahead=8", "train.packs_per_step=2"),
    *("train.steps=2", "train.warmup=1", "checkpoint.every=0", "telemetry.tensorboard=false"),
    *("telemetry.peak_tflops=1", "telemetry.sample_steps=2"),
)
"""The same options and tasks as tiny.yaml, in milliseconds a step."""

ELSEWHERE = {
    "run.dir": "the folder of every run here",
    "data.root": "the folder of the data",
    "data.sources": "in `test_sources`",
    "data.tokenizer": "tests/data/test_tokenizer.py",
    "data.latents": "tests/data/test_latents.py",
    "data.index_dir": "a folder; tests/data/test_index_cache.py",
    "run.resume": "tests/train/test_resume.py",
    "run.init_from": "tests/train/test_stages.py",
    "run.init_weights": "needs run.init_from; tests/train/test_stages.py",
    "model.vae.path": "weights; tests/model/test_vae.py",
    "telemetry.prompts": "with telemetry.sample_every",
    "telemetry.sample_size": "with telemetry.sample_every",
}
"""Options whose values are files, or belong to others."""

WITH = {
    "telemetry.sample_every": ("telemetry.prompts=[a red circle]",),
    "model.vae.width_multipliers": (),
}
"""Further words that make a value meaningful."""

TOO_MUCH = 2000
"""Numbers above it are no edges to train with: they take memory or time by their meaning. tests/config has the ends."""


def options(kind: Any = Config, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, type, default) of every option."""
    hints, plain = get_type_hints(kind), kind()
    for field in fields(kind):
        key, default = f"{path}.{field.name}" if path else field.name, getattr(plain, field.name)
        if is_dataclass(hints[field.name]):
            yield from options(hints[field.name], key)
        else:
            yield key, hints[field.name], default


def words(key: str, kind: Any, default: Any) -> list[str]:
    """Values to try, as words of the command line."""
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    if NoneType in get_args(kind):
        (inner,) = (arg for arg in get_args(kind) if arg is not NoneType)
        return ["null", *(word for word in words(key, inner, default or 1) if inner is not str)]
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        choices = get_args(get_args(kind)[0])
        return ["[]", *(f"[{choice}]" for choice in choices), f"[{', '.join(choices)}]"]
    if kind in (int, float):
        return sorted({_number(kind, value) for value in edges(key, kind, default)})
    if get_origin(kind) is tuple:
        return ["[]", "[1]", "[1, 1]", "[2, 2]"]
    raise AssertionError(f"{key}: no values known for {kind}; add it to ELSEWHERE or here")


def _number(kind: type, value: float) -> str:
    return str(int(value)) if kind is int else repr(float(value))


def edges(key: str, kind: type, default: float) -> Iterator[float]:
    """The least legal values, the greatest legal one unless it is TOO_MUCH, and the neighbours of the default."""
    (allowed,) = (row for row in RANGES if key in row.keys or f"{key}.*" in row.keys)
    most = MOST.get(key, MOST_OF_ALL if kind is int else math.inf)
    candidates = [0, 1, 2, 3, default, default + 1, default * 2, default / 2]
    candidates += [0.5, 1e-12, 0.999999] if kind is float else []
    for value in candidates:
        number = kind(value)
        if allowed.holds(number) and number <= min(most, max(TOO_MUCH, default)):
            yield number


CASES = [
    (key, word)
    for key, kind, default in options()
    if key not in ELSEWHERE
    for word in words(key, kind, default)
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every-option")


def outcome(words: list[str], run: Path, data: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the last lines of stderr."""
    import torch

    torch.manual_seed(0)
    found = main(["train", str(CONFIG), *SMALL, f"run.dir={run}", f"data.root={data}", *words])
    return found, capfd.readouterr().err


def assert_sound(key: str, word: str, code: int, told: str, run: Path) -> None:
    """The run finished with as many records as it has steps, or was refused by a message with the key."""
    if code == 0:
        steps = int(word) if key == "train.steps" else 2
        assert len((run / "metrics.jsonl").read_text().splitlines()) == steps, told[-2000:]
        assert any((run / "checkpoints").glob("step_*/manifest.json"))
        return
    assert code == 2 and ERROR_PREFIX in told and "Traceback" not in told, told[-3000:]
    message = told[told.rindex(ERROR_PREFIX) :]
    assert key in message or key.rpartition(".")[2] in message, message


@pytest.mark.thorough
@pytest.mark.parametrize(("key", "word"), CASES, ids=[f"{key}={word}" for key, word in CASES])
def test_option(key: str, word: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, told = outcome([f"{key}={word}", *WITH.get(key, ())], tmp_path / "run", data, capfd)
    assert_sound(key, word, code, told, tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize("task", get_args(get_type_hints(SourceConfig)["task"]))
def test_sources(task: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shards = {"t2i": "scenes", "i2t": "scenes", "edit": "edits", "video": "clips", "text": "notes"}.get(task, "edits")
    words = [f"data.sources=[{{name: one, path: '{shards}-*.tar', task: {task}, weight: 1}}]"]
    code, told = outcome(words, tmp_path / "run", data, capfd)
    assert code == 0, told[-3000:]


def test_every_option_is_walked() -> None:
    """The walk meets every leaf of the schema, and each is tried or named with the test that does."""
    keys = [key for key, _, _ in options()]
    assert len(keys) == len(set(keys)) and {"data.workers", "parallel.attention", "train.freeze"} <= set(keys)
    assert ELSEWHERE.keys() <= set(keys)
    tried = {key for key, _ in CASES}
    assert tried | ELSEWHERE.keys() == set(keys)
    assert ("data.workers", "1") in CASES and ("train.freeze", "[und]") in CASES


SAMPLE = (("data.workers", "1"), ("train.loss_normalization", "micro_step"), ("parallel.recompute", "full"))


@pytest.mark.parametrize(("key", "word"), SAMPLE)
def test_a_sample_of_them(key: str, word: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (key, word) in CASES
    code, told = outcome([f"{key}={word}"], tmp_path / "run", data, capfd)
    assert_sound(key, word, code, told, tmp_path / "run")
