"""The example scripts under a real Slurm on this machine: start, signal, requeue, chain.

The suite takes its server down again; where Slurm is not installed, it says so and is skipped.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabagel.config.load import dump
from tests.config.tree import change
from tests.slurm.cluster import ROOT, SCRIPTS, SMALL, Cluster, running
from tests.small_run import small_config, write_data

pytestmark = pytest.mark.slow
TIMES = ("seconds", "per_s", "mfu", "mem", "wait")
"""Parts of the names of what a record measures, rather than computes."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to be interrupted."""
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    path = root / "small.yaml"
    dump(change(small_config(root), {"train.steps": 60, "parallel.pp": 2}), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What the run computes when nothing happens, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "megabagel", "train", str(config), f"run.dir={run}", "--nproc", "2"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    return computed(run)


def records(run: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or its last line is being written
        return []


def computed(run: Path) -> list[dict[str, object]]:
    """The records without what they measure."""
    return [{key: value for key, value in line.items() if not any(x in key for x in TIMES)} for line in records(run)]


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while len(records(run)) < step:
        assert time.monotonic() < end, f"{len(records(run))} steps after {seconds} s"
        time.sleep(0.05)


def test_job_of_two_nodes_trains(
    cluster: Cluster, config: Path, undisturbed: list[dict[str, object]], tmp_path: Path
) -> None:
    job = cluster.submit(SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}")
    assert cluster.ended(job, 180) == "COMPLETED", cluster.log(job)
    assert computed(tmp_path) == undisturbed
    log = (cluster.folder / f"logs/megabagel-{job}.log").read_text()
    assert "megatron-core" in log  # the doctor's report
    assert "step 60/60" in log  # the end of rank 0's
    assert (cluster.folder / f"logs/megabagel-{job}/rank-1.log").is_file()


def test_signalled_job_is_requeued_and_goes_on_exactly(
    cluster: Cluster, config: Path, undisturbed: list[dict[str, object]], tmp_path: Path
) -> None:
    job = cluster.submit(SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}")
    wait_for_step(tmp_path, 5)
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.ended(job, 240) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert "USR1: the ranks finish their step and save" in log
    assert "start 1, 2 nodes" in log  # Slurm's count of restarts
    assert "resumed from" in log
    assert computed(tmp_path) == undisturbed


def test_chain_continues_and_its_last_job_finds_nothing_to_do(
    cluster: Cluster, config: Path, undisturbed: list[dict[str, object]], tmp_path: Path
) -> None:
    words = [SCRIPTS / "chain.sh", "3", *SMALL, SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}"]
    first, second, third = cluster.call(*words).split()
    wait_for_step(tmp_path, 5)
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    assert [cluster.ended(job, 240) for job in (first, second, third)] == ["COMPLETED"] * 3, cluster.log(first)
    assert "resumed from" in cluster.log(second)
    assert computed(tmp_path) == undisturbed


def test_a_failing_run_is_not_requeued(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.submit(SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}", "train.stops=3")
    assert cluster.ended(job, 120) == "FAILED"
    assert "train.steps" in cluster.log(job)  # the nearest name
    assert "start 1" not in cluster.log(job)


def test_a_job_without_config_says_so(cluster: Cluster) -> None:
    job = cluster.submit(SCRIPTS / "train.sbatch")
    assert cluster.ended(job, 60) == "FAILED"
    assert "no config" in cluster.log(job)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*SCRIPTS.iterdir(), *(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
