"""Ranks that die, stop, hang, fail or do not come: every other rank ends soon, and says which one and where."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from psutil import Process

from megabagel.errors import STOP_PREFIX, Interrupted, Preempted, RankLost, TransientFailure
from tests.support.cli_harness import metrics, pairs, tiny_run
from tools.faulty_rank import STEP
from tools.warm_jobs import Job

KILLED = 128 + signal.SIGKILL
SOON = 30.0
"""Seconds in which all is over on a busy machine; the limits in use are a few seconds."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"), pairs(6))


class Jobs:
    """Starts jobs on one folder, and ends what a test leaves behind."""

    def __init__(self, folder: Path, config: Path) -> None:
        self.folder, self.run, self.config = folder, folder / "run", config
        self.started: list[Job] = []

    def start(self, *words: object, size: int = 2, fault: str | None = None, ranks: tuple[int, ...] = ()) -> Job:
        limits = ["run.heartbeat_timeout=3", "train.steps=100000"]
        words = (self.config, f"run.dir={self.run}", *limits, *words)
        self.started.append(Job(self.folder / f"job-{len(self.started)}", size, *words, fault=fault, start=ranks))
        return self.started[-1]

    def until(self, job: Job, steps: int) -> None:
        """Wait until so many steps are on record."""
        end = time.monotonic() + 60
        path = self.run / "metrics.jsonl"
        while not (path.is_file() and path.read_text().count("\n") >= steps):
            assert job.alive and time.monotonic() < end, job.texts
            time.sleep(0.01)


@pytest.fixture
def jobs(tmp_path: Path, tiny: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path, tiny)
    yield jobs
    for job in jobs.started:
        job.kill()


def message(text: str) -> str:
    """The one message that a rank ends with."""
    assert text.count(STOP_PREFIX) == 1, text
    return text.partition(STOP_PREFIX)[2]


def test_a_killed_rank_is_named(jobs: Jobs) -> None:
    job = jobs.start("train.packs_per_step=3", size=3)
    jobs.until(job, 2)
    job.signal(signal.SIGKILL, 1)
    assert job.wait(SOON) == {0: RankLost.code, 1: KILLED, 2: RankLost.code}
    for rank in (0, 2):
        assert re.search(r"no sign of life for \d s: rank 1 \(.*, process \d+\) is dead", message(job.texts[rank]))


@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_worker_ends_every_rank_with_its_name_and_a_code_that_requeues(jobs: Jobs, size: int) -> None:
    """As the system kills for memory. The worker is one of the last rank's."""
    job = jobs.start("data.workers=2", size=size)
    jobs.until(job, 2)
    (server,) = [child for child in Process(job.ranks[size - 1].pid).children() if child.children()]
    server.children()[-1].kill()
    assert job.wait(SOON) == dict.fromkeys(range(size), TransientFailure.code)
    for text in job.texts:
        assert re.search(r"data: (worker \d|planner) \(process \d+\) died \(signal 9\) at work on .*data.workers", text)
        assert "Traceback" not in text


def test_the_death_of_rank_0_is_noticed_by_its_store(jobs: Jobs) -> None:
    job = jobs.start()
    jobs.until(job, 2)
    job.signal(signal.SIGKILL, 0)
    assert job.wait(SOON) == {0: KILLED, 1: RankLost.code}
    assert "the job's store is gone: rank 0 has ended" in message(job.texts[1])


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_is_named(jobs: Jobs, victim: int) -> None:
    job = jobs.start()
    jobs.until(job, 2)
    job.signal(signal.SIGSTOP, victim)
    assert job.wait(SOON, 1 - victim)[1 - victim] == RankLost.code
    said = message(job.texts[1 - victim])
    assert ("has not answered for" in said and "rank 0 hangs" in said) if victim == 0 else "rank 1 (" in said
    assert "train/" in said.splitlines()[1] or "parallel/" in said.splitlines()[1], "where the others waited"


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("hang_in_data", "in phase data after step 2 at megabagel/"),
        ("wrong_collective", "in phase train after step 2, in recv at megabagel/"),
    ],
)
def test_a_hung_rank_is_named_with_those_that_wait_for_it(jobs: Jobs, fault: str, where: str) -> None:
    job = jobs.start("run.timeout=3", fault=fault)
    jobs.until(job, STEP)
    assert job.wait(SOON) == {0: RankLost.code, 1: RankLost.code}
    for text in job.texts:
        blamed, _, others = message(text).partition("Meanwhile")
        assert "no progress within run.timeout=3 s: rank 1 (" in blamed and "rank 0" not in blamed
        assert "rank 0 waits" in others and "in all_reduce at megabagel/" in others
        assert f"hangs {where}" in blamed


def test_a_rank_that_fails_is_named_with_its_error(jobs: Jobs) -> None:
    job = jobs.start(fault="bug")
    assert job.wait(SOON) == {0: RankLost.code, 1: 1}
    assert "Traceback" in job.texts[1] and STOP_PREFIX not in job.texts[1]
    assert "rank 1 failed in phase train after step 2: ZeroDivisionError: a bug" in message(job.texts[0])


def test_an_absent_rank_is_named(jobs: Jobs) -> None:
    job = jobs.start("run.start_timeout=8", "train.packs_per_step=4", size=4, ranks=(0, 1, 3))
    assert job.wait(SOON) == {0: 2, 1: 2, 3: 2}
    for rank in (0, 1, 3):
        assert "rank 2 of 4 did not start within run.start_timeout=8 s" in job.texts[rank]
        assert "Traceback" not in job.texts[rank]


def test_without_rank_0_nobody_waits_for_ever(jobs: Jobs) -> None:
    job = jobs.start("run.start_timeout=2", size=2, ranks=(1,))
    assert job.wait(SOON) == {1: 2}
    assert "rank 1 of 2 cannot meet the others there" in job.texts[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_stops_all(jobs: Jobs, number: signal.Signals) -> None:
    job = jobs.start()
    jobs.until(job, 2)
    job.signal(number, 1)
    assert job.wait(SOON) == dict.fromkeys(range(2), Preempted.code)
    done = len(metrics(jobs.run))
    folder = jobs.run / "checkpoints" / f"step_{done:08d}"
    for text in job.texts:
        assert message(text).startswith(f"{number.name} after step {done} of 100000; everything is saved in {folder}")
    again = jobs.start(f"train.steps={done + 1}")
    assert again.wait(60) == {0: 0, 1: 0}
    assert f"resumed from {folder} at step {done}" in again.texts[0]
    assert [record["step"] for record in metrics(jobs.run)] == list(range(1, done + 2))


def test_ctrl_c_says_what_is_saved(jobs: Jobs) -> None:
    job = jobs.start("checkpoint.every=2", size=1)
    jobs.until(job, 5)
    job.signal(signal.SIGINT)
    assert job.wait(SOON) == {0: Interrupted.code}
    found = re.fullmatch(
        r"Ctrl-C after step (\d+) of 100000: step (\d+) is saved in (.*), (\d+) steps since are lost\. .*",
        message(job.texts[0]).strip(),
    )
    assert found and int(found[1]) - int(found[2]) == int(found[4]) and Path(found[3], "manifest.json").is_file()


def test_more_signals_do_not_hurry_the_save(jobs: Jobs) -> None:
    job = jobs.start()
    jobs.until(job, 2)
    while job.alive:
        job.signal(signal.SIGTERM)
        job.signal(signal.SIGUSR1, 0)
        time.sleep(0.005)
    assert job.wait(SOON) == dict.fromkeys(range(2), Preempted.code)
    done = len(metrics(jobs.run))
    assert jobs.start(f"train.steps={done + 1}").wait(60) == {0: 0, 1: 0}


def test_a_signal_while_it_starts_is_heeded_after_the_first_step(jobs: Jobs) -> None:
    job = jobs.start()
    while not any(job.texts):
        time.sleep(0.005)
    job.signal(signal.SIGTERM, 0)
    assert job.wait(60) == dict.fromkeys(range(2), Preempted.code)
    assert len(metrics(jobs.run)) == 1


def test_a_second_run_in_one_folder_is_refused_and_both_records_stay_whole(jobs: Jobs) -> None:
    first = jobs.start("checkpoint.every=2")
    jobs.until(first, 2)
    second = jobs.start("train.lr=0.5", "run.resume=none")
    assert second.wait(60) == {0: 2, 1: 2}
    for text in second.texts:
        assert f"run.dir={jobs.run}: in use by process {first.ranks[0].pid} on" in text and "Traceback" not in text
    assert first.alive and not list(jobs.run.glob("checkpoints-*"))
    first.signal(signal.SIGKILL)
    first.wait(SOON)
    assert jobs.start("train.steps=1").wait(60) == {0: 0, 1: 0}, "kill -9 leaves no lock"
    steps = [record["step"] for record in metrics(jobs.run)]
    assert steps == list(range(1, len(steps) + 1))
