"""No damaged checkpoint is loaded by any way in: each is refused by a message that names it, and nothing in it runs."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabagel.config.schema import CheckpointConfig, Config, RunConfig
from tests.support.checkpoint_states import tensors_of, whole_tensors
from tests.support.corruptions import DAMAGES, KEY, MARKER
from tests.support.grid_run import Harness, base_config, on_grid
from tests.support.rank_pool import RankPool

MAY_PASS = ("load", "init", "export")
"""Ways in that do not open every file: what they read must be what was written."""

Outcomes = dict[str, dict[str, str]]
"""By damage and way in: a message, or what was read."""


def config_of(folder: Path) -> Config:
    base = base_config()
    vit = replace(base.model.vit, layers=1)
    model = replace(base.model, layers=1, hidden=32, ffn=48, heads=4, head_dim=8, vit=vit)
    return replace(base, model=model, run=RunConfig(dir=str(folder)), checkpoint=CheckpointConfig(async_save=False))


def write(config: Config) -> None:
    """A checkpoint of the initial state as step 3."""
    from megabagel.checkpoint import api

    harness = Harness(config)
    api.save(config, harness.grid, 3, tensors_of(harness), {"plan": "kept"})


def ways_in(config: Config, good: Path, scratch: Path, damages: dict[str, None] | None = None) -> Outcomes:
    """What came of every damage by every way in; `damages` names others, which do nothing."""
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    grid = mesh.build(config)
    found = {}
    for name in damages or DAMAGES:
        root = scratch / "checkpoints"
        shutil.copytree(good, root / "step_00000002")
        shutil.copytree(good, root / "step_00000003")
        (root / "latest").write_text("step_00000003")
        if name in DAMAGES:
            DAMAGES[name](root / "step_00000003")
        found[name] = _try_all(replace(config, run=RunConfig(dir=str(scratch))), grid, root / "step_00000003")
        shutil.rmtree(scratch)
    return found


def _try_all(config: Config, grid: Any, folder: Path) -> dict[str, str]:
    from megabagel.checkpoint import api
    from megabagel.checkpoint.describe import describe
    from megabagel.checkpoint.hf.exporter import export
    from megabagel.checkpoint.reader import verify
    from megabagel.checkpoint.reshard import reshard

    named = replace(config, run=RunConfig(dir=config.run.dir, resume=str(folder)))

    good, out = folder.with_name("step_00000002"), folder.parent / "out"

    def load(tensors: dict[str, Any]) -> str:
        api.load(folder, tensors)
        return hashlib.sha256(b"".join(tensors[name].data.numpy().tobytes() for name in sorted(tensors))).hexdigest()

    def exported() -> str:
        export(folder, out)
        return hashlib.sha256((out / "ema.safetensors").read_bytes()).hexdigest()

    ways: dict[str, Callable[[], object]] = {
        "auto": lambda: api.find(config, grid),
        "named": lambda: api.find(named, grid),
        "load": lambda: load(whole_tensors(good)),
        "init": lambda: load(api.weights_of(folder, config, whole_tensors(good))),
        "verify": lambda: verify(folder),
        "reshard": lambda: reshard(folder, out, {"tp": 1}),
        "export": exported,
        "inspect": lambda: describe(folder),
    }
    return {way: _outcome(attempt, folder) for way, attempt in ways.items()}


def _outcome(attempt: Callable[[], object], folder: Path) -> str:
    from megabagel.errors import UserError

    try:
        result = attempt()
    except UserError as error:
        outcome = str(error)
    except BaseException as error:
        outcome = f"CRASH {error!r}"
    else:
        outcome = f"RETURNED {result}"
    finally:
        shutil.rmtree(folder.parent / "out", ignore_errors=True)
    return "RAN" if (folder.parent / MARKER).exists() else outcome


@pytest.fixture(scope="module")
def good(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("good")
    ranks.run(2, write, on_grid(config_of(folder), 2, 1, 1, 1))
    return folder / "checkpoints" / "step_00000003"


@pytest.fixture(scope="module")
def outcomes(ranks: RankPool, good: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    scratch = tmp_path_factory.mktemp("damaged") / "run"
    (found,) = ranks.run(1, ways_in, config_of(scratch), good, scratch)
    return found


@pytest.fixture(scope="module")
def undamaged(ranks: RankPool, good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What comes of the good one."""
    scratch = tmp_path_factory.mktemp("undamaged") / "run"
    (found,) = ranks.run(1, ways_in, config_of(scratch), good, scratch, {"nothing": None})
    return found["nothing"]


def test_the_good_one_is_worth_damaging(good: Path) -> None:
    index = json.loads((good / "index.json").read_text())
    assert {box[0] for box in index[KEY]["boxes"]} == {"rank_00000.safetensors", "rank_00001.safetensors"}
    assert {key.split("/")[0] for key in index} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert len(DAMAGES) >= 40


@pytest.mark.parametrize("name", DAMAGES)
def test_damage(outcomes: Outcomes, undamaged: dict[str, str], name: str) -> None:
    found = outcomes[name]
    assert found["auto"].endswith("checkpoints/step_00000002"), "run.resume=auto takes the one before"
    for way, outcome in found.items():
        assert not outcome.startswith(("CRASH", "RAN")), (way, outcome)
        if outcome.startswith("RETURNED"):  # then by a way that does not read what is damaged
            assert way in ("auto", "inspect") or (way in MAY_PASS and outcome == undamaged[way]), (way, outcome)
        else:
            assert "step_00000003" in outcome, (way, outcome)


def test_the_good_one_comes_in_by_every_way(undamaged: dict[str, str]) -> None:
    assert all(outcome.startswith("RETURNED") for outcome in undamaged.values()), undamaged
