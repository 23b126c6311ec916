"""Other engines give the bytes of the pool: an array under a throw-away Slurm, and a Ray cluster of two nodes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megabagel.curation.recipe import all_steps, load_recipe
from tests.curation.conftest import WEB, Inline, contents, curated
from tests.support.slurm_cluster import NO_GPUS, ROOT, SCRIPTS, running

EXAMPLES = sorted((ROOT / "examples" / "curation").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.steps and recipe.digest == load_recipe(path).digest


def test_the_document_has_every_step_and_its_tests() -> None:
    text = (ROOT / "docs" / "curation.md").read_text()
    ours = {name for name, step in all_steps().items() if step.run.__module__.startswith("megabagel.curation.")}
    assert ours <= set(re.findall(r"`(\w+)`", text))
    named = set(re.findall(r"`(test_\w+\.py)`", text))
    assert named and all((Path(__file__).parent / name).is_file() for name in named)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "web.yaml"
    path.write_text(json.dumps(WEB))
    return path


@pytest.mark.slow
def test_an_array_under_slurm(pages: Path, recipe: Path, tmp_path: Path, inline: Inline) -> None:
    curated(WEB, pages, tmp_path / "pool")
    out = tmp_path / "array"
    with running(tmp_path) as cluster:
        words = ("--array=0-2", *NO_GPUS, SCRIPTS / "curate.sbatch", recipe, "--in", pages, "--out", out)
        job = cluster.submit(*words)
        assert [cluster.ended(f"{job}_{task}") for task in range(3)] == ["COMPLETED"] * 3, cluster.log(job)
    assert contents(out) == contents(tmp_path / "pool")


@pytest.mark.thorough
def test_a_ray_cluster_of_two_nodes(pages: Path, recipe: Path, tmp_path: Path, inline: Inline) -> None:
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    curated(WEB, pages, tmp_path / "pool")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    out = tmp_path / "ray"
    try:
        command = [sys.executable, "-m", "megabagel", "curate", "run", recipe, "--in", pages, "--out", out]
        command += ["--engine", "ray", "--workers", "2"]
        subprocess.run(command, check=True, env={**_environment(), "RAY_ADDRESS": cluster.address}, timeout=200)
    finally:
        cluster.shutdown()
    assert contents(out) == contents(tmp_path / "pool")


def _environment() -> dict[str, str]:
    places = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def test_an_absent_ray_is_named(monkeypatch: pytest.MonkeyPatch, pages: Path, tmp_path: Path) -> None:
    from megabagel.curation.engines import engine_of
    from megabagel.errors import UserError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'megabagel\[curate-ray\]'"):
        engine_of("ray", 2)
