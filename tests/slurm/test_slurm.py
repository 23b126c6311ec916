"""The example scripts under a real Slurm on this machine: start, time limit, requeue, cancel, chain, array, reshard.

The suite takes its server down again; where Slurm is not installed, it says so and is skipped.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from megabagel.config.load import dump
from tests.support.config_tree import change
from tests.support.slurm_cluster import NO_GPUS, ROOT, SCRIPTS, TWO_NODES, Cluster, running
from tests.support.small_run import small_config, write_data

pytestmark = pytest.mark.slow
STEPS = 60
"""Enough that a run of two ranks is still under way when its first lines are seen."""
TIMES = ("seconds", "per_s", "mfu", "mem", "wait", "slowest_rank")
"""Parts of the names of what a record measures, rather than computes."""
QUICK = ("--synthetic", "--warmup", "1", "--steps", "1", "--phases", "1")
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_data(root)
    path = root / "small.yaml"
    dump(change(small_config(root), {"train.steps": STEPS, "parallel.pp": 2}), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run when nothing happens, without Slurm."""
    run = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, "-m", "megabagel", "train", str(config), f"run.dir={run}", "--nproc", "2"]
    subprocess.run(command, check=True, cwd=ROOT, timeout=300)
    return run


def records(run: Path) -> list[dict[str, object]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or its last line is being written
        return []


def computed(run: Path) -> list[dict[str, object]]:
    """The records without what they measure."""
    return [{key: value for key, value in line.items() if not any(x in key for x in TIMES)} for line in records(run)]


def train(cluster: Cluster, config: Path, run: Path, *options: str) -> str:
    """Submit train.sbatch on two nodes."""
    return cluster.submit(*TWO_NODES, *options, SCRIPTS / "train.sbatch", config, f"run.dir={run}")


def reaches(cluster: Cluster, job: str, run: Path, step: int) -> None:
    cluster.wait(job, lambda: len(records(run)) >= step)


def test_job_of_two_nodes_trains(cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = train(cluster, config, tmp_path)
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    assert len(computed(tmp_path)) == STEPS
    assert computed(tmp_path) == computed(undisturbed)
    log = (cluster.folder / f"logs/megabagel-{job}.log").read_text()
    assert "megatron-core" in log  # the doctor's report
    assert f"step {STEPS}/{STEPS}" in log  # the end of rank 0's
    assert (cluster.folder / f"logs/megabagel-{job}/rank-1.log").is_file()


def test_time_limit_requeues_and_the_run_goes_on_exactly(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Slurm looks at time limits twice a minute: meanwhile the ranks stand still, as in a very long step."""
    job = train(cluster, config, tmp_path, "--signal=B:USR1@30")
    reaches(cluster, job, tmp_path, 5)
    ranks = f"{job}.1"  # step 0 was the doctor
    cluster.call("scancel", "--signal=STOP", ranks)
    cluster.call("scontrol", "update", f"JobId={job}", "EndTime=now+60")  # the limit is a minute away
    cluster.wait(job, lambda: "USR1: the ranks finish their step and save" in cluster.log(job))
    seen = len(records(tmp_path))
    cluster.call("scancel", "--signal=CONT", ranks)
    cluster.wait(job, lambda: cluster.state(job) == "PENDING")
    cut = len(records(tmp_path))
    assert seen <= cut < STEPS
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    log = cluster.log(job)
    assert "start 1, 2 nodes" in log  # Slurm's count of restarts
    assert f"resumed from {tmp_path}/checkpoints/step_{cut:08}" in log
    assert computed(tmp_path) == computed(undisturbed)


def test_cancelled_job_saves_and_stays_out_of_the_queue(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = train(cluster, config, tmp_path)
    reaches(cluster, job, tmp_path, 2)
    cluster.call("scancel", job)
    cluster.wait(job, lambda: "ended with code 75" in cluster.log(job))
    assert cluster.ended(job) == "CANCELLED"
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert saved == [f"step_{len(records(tmp_path)):08}"]


@pytest.mark.thorough
def test_chain_continues_and_its_last_job_finds_nothing_to_do(
    cluster: Cluster, config: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = [
        SCRIPTS / "chain.sh",
        "3",
        *TWO_NODES,
        SCRIPTS / "train.sbatch",
        config,
        f"run.dir={tmp_path}",
    ]
    first, second, third = cluster.call(*words).split()
    reaches(cluster, first, tmp_path, 5)
    cluster.call("scancel", "--batch", "--signal=USR1", first)
    assert [cluster.ended(job) for job in (first, second, third)] == ["COMPLETED"] * 3, cluster.log(first)
    assert "resumed from" in cluster.log(second)
    assert computed(tmp_path) == computed(undisturbed)


def test_failing_run_is_not_requeued(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}", "train.stops=3")
    assert cluster.ended(job) == "FAILED"
    assert "train.steps" in cluster.log(job)  # the nearest name
    assert "start 1" not in cluster.log(job)


def test_limit_that_leaves_no_time_to_start_is_not_requeued_for_ever(
    cluster: Cluster, config: Path, tmp_path: Path
) -> None:
    slow = tmp_path / "megabagel"
    slow.write_text("#!/bin/sh\nsleep 2\n")  # in place of doctor; it never gets as far as training
    slow.chmod(0o755)
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch", config, MEGABAGEL=str(slow))

    def begun(start: int) -> bool:
        cluster.hurry(job)
        return f"start {start}, 2 nodes" in cluster.log(job)

    for start in range(2):
        cluster.wait(job, partial(begun, start))
        cluster.call("scancel", "--batch", "--signal=USR1", job)
    assert cluster.ended(job) == "FAILED"
    assert "submit again with a longer --time" in cluster.log(job)


@pytest.mark.thorough
def test_limit_shorter_than_a_step_is_named_by_every_rank(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """Slurm's signals at a limit, sent here without waiting for one: USR1 to the script, TERM to all, KILL."""
    script = (SCRIPTS / "train.sbatch", config, f"run.dir={tmp_path}", "train.packs_per_step=3000")
    job = cluster.submit(*TWO_NODES, *script)
    cluster.wait(job, lambda: "peak for MFU" in cluster.log(job))
    cluster.call("scancel", "--batch", "--signal=USR1", job)
    early, late = "USR1 .* before the first step is finished", "SIGTERM .* shorter than a start and a step"
    cluster.wait(job, lambda: len(re.findall(early, cluster.log(job))) == 2)
    cluster.call("scancel", "--signal=TERM", f"{job}.1")
    cluster.wait(job, lambda: len(re.findall(late, cluster.log(job))) == 2)
    cluster.call("scancel", "--signal=KILL", f"{job}.1")
    assert cluster.ended(job) == "FAILED"


def test_job_without_config_says_so(cluster: Cluster) -> None:
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch")
    assert cluster.ended(job) == "FAILED"
    assert "no config" in cluster.log(job)


@pytest.mark.thorough
def test_array_measures_a_grid_per_job(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    grids = tmp_path / "grids"
    grids.write_text("# two of them\nparallel.pp=2\n\nparallel.pp=1 parallel.tp=2\n")
    options = ("--array=0-2", "--nodes=1", "--ntasks-per-node=2", *NO_GPUS)
    array = cluster.submit(*options, SCRIPTS / "benchmark.sbatch", config, grids, *QUICK)
    jobs = [f"{array}_{number}" for number in range(3)]
    states = [cluster.ended(job) for job in jobs]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"], "\n".join(map(cluster.log, jobs))
    assert "the file has 2 grids; --array=0-1" in cluster.log(jobs[2])
    reports = [cluster.folder / f"runs/bench/{array}/grid-{number}/bench.json" for number in range(2)]
    compared = cluster.call(cluster.program, "bench", "compare", *reports)
    assert compared.startswith("small pp2 -> small tp2\n")
    assert "tokens/s per rank" in compared


@pytest.mark.thorough
def test_reshard_job(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    source, moved = undisturbed / "checkpoints" / f"step_{STEPS:08}", tmp_path / "moved"
    job = cluster.submit(
        *NO_GPUS, "--mem=1G", SCRIPTS / "reshard.sbatch", source, moved, "parallel.pp=1", "parallel.tp=2"
    )
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    assert f"{moved}: written as tp 2 x pp 1 x vpp 1 x cp 1 x dp 1" in cluster.log(job)
    cluster.call(cluster.program, "checkpoint", "diff", source, moved)


@pytest.mark.parametrize(
    ("setting", "address", "says"),
    [
        ("parallel.tp=2", "127.0.0.1", "world size = 2, parallel.tp = 2, parallel.pp = 2"),
        ("run.start_timeout=3", "192.0.2.1", "MASTER_ADDR=192.0.2.1"),  # of RFC 5737: reaches nobody
    ],
)
def test_every_rank_names_a_mistake_and_ends(
    cluster: Cluster, config: Path, tmp_path: Path, setting: str, address: str, says: str
) -> None:
    command = (cluster.program, "train", config, f"run.dir={tmp_path}", setting)
    done = cluster.run("srun", "--label", "--nodes=2", "--ntasks=2", *command, MASTER_ADDR=address)
    assert done.returncode == 2, done.stdout
    for rank in range(2):
        said = [line for line in done.stdout.splitlines() if line.startswith(f"{rank}: ")]
        assert any(says in line for line in said), done.stdout
        assert not any("Traceback" in line for line in said)


@pytest.mark.skipif(SHELLCHECK is None, reason="no shellcheck here: apt-get install shellcheck")
def test_scripts_pass_shellcheck() -> None:
    scripts = [*SCRIPTS.iterdir(), *(ROOT / "tools").glob("*.sh"), ROOT / ".ci" / "run"]
    done = subprocess.run([str(SHELLCHECK), *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_failure_of_the_machine_is_requeued_a_few_times(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    broken = tmp_path / "megabagel"
    broken.write_text('#!/bin/sh\n[ "$1" = doctor ] || exit 74\n')
    broken.chmod(0o755)
    job = cluster.submit(*TWO_NODES, SCRIPTS / "train.sbatch", config, MEGABAGEL=str(broken), RETRIES="1")
    assert cluster.ended(job) == "FAILED"
    log = cluster.log(job)
    assert "start 1, 2 nodes" in log and "start 2" not in log
    assert "code 74: the machine failed, failure 1 in a row; requeued" in log


def test_two_steps_of_one_allocation_train_apart(cluster: Cluster, config: Path, tmp_path: Path) -> None:
    """At the same time, on the same nodes, with one secret: two groups of ranks."""
    script = tmp_path / "both.sbatch"
    step = 'srun --overlap --label "$MEGABAGEL" train "$1" train.steps=4 parallel.pp=2'
    script.write_text(
        "#!/bin/bash\nexport MEGABAGEL_JOB_SECRET=x\n"
        f'{step} run.dir="$2/one" & one=$!\n'
        f'{step} run.dir="$2/other" train.seed=6 & other=$!\n'
        "wait $one && wait $other\n"
    )
    job = cluster.submit(*TWO_NODES, "--output=logs/both-%j.log", script, config, tmp_path)
    assert cluster.ended(job) == "COMPLETED", cluster.log(job)
    one, other = computed(tmp_path / "one"), computed(tmp_path / "other")
    assert len(one) == len(other) == 4
    assert all(a["loss"] != b["loss"] for a, b in zip(one, other, strict=True)), "each by its own seed"
