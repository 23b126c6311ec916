"""Worker processes: results in order, and every way to end."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from megabagel.data.files import OPEN_FILES
from megabagel.data.load.workers import Worker, WorkerError
from megabagel.errors import TransientFailure, UserError
from tests.support.worker_tasks import Unreadable, double

ROOT = Path(__file__).parents[2]


def until(done: Callable[[], bool], seconds: float = 20.0) -> bool:
    """Whether it is done in time."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.02)
    return done()


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends between open and read
        return False


@pytest.fixture
def late() -> list[str]:
    return []


@pytest.fixture
def worker(late: list[str]) -> Iterator[Worker]:
    with Worker("worker 3", double, lambda task: f"task {task!r}", 0.5, late.append) as made:
        made.send(0)
        made.receive()  # it is there
        late.clear()
        yield made


def test_results_come_in_the_order_of_the_tasks(worker: Worker, late: list[str]) -> None:
    for task in range(50):
        worker.send(task)
    assert [worker.receive() for _ in range(50)] == [2 * task for task in range(50)]
    worker.send(("large", 3_000_000))
    assert torch.equal(worker.receive(), torch.arange(3_000_000))
    assert not worker.tasks and not late


def test_errors_arrive_with_their_traceback_and_the_worker_goes_on(worker: Worker) -> None:
    for task in ("user error", "bug", 4):
        worker.send(task)
    with pytest.raises(UserError, match="mend this"):
        worker.receive()
    with pytest.raises(ZeroDivisionError) as caught:
        worker.receive()
    assert "worker_tasks.py" in str(caught.value.__cause__) and "1 // 0" in str(caught.value.__cause__)
    assert worker.receive() == 8


def test_what_a_worker_logs_is_logged_here_by_the_rules_of_here(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    for message in ("first", "second"):
        worker.send(("log", message))
    worker.receive()
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("megabagel.data.plan.global_plan", "told: first")]
    logging.getLogger("megabagel.data.plan.global_plan").setLevel(logging.ERROR)
    worker.receive()
    logging.getLogger("megabagel.data.plan.global_plan").setLevel(logging.NOTSET)
    assert len(caplog.records) == 1


def test_a_killed_worker_is_named_with_its_task(worker: Worker) -> None:
    for task in (1, "die", 2):
        worker.send(task)
    assert worker.receive() == 2
    expected = rf"data: worker 3 \(process {worker.process.pid}\) died \(signal 9\) at work on task 'die'\. .*workers"
    with pytest.raises(TransientFailure, match=expected):
        worker.receive()


@pytest.mark.parametrize(
    ("task", "kind", "says"),
    [
        ("lambda", AttributeError, "lambda"),  # a result that cannot be pickled
        ("half pickled", WorkerError, "Half: cannot be pickled"),
        ("one way", WorkerError, "OneWay: 1 and 2"),
        ("exit", WorkerError, "SystemExit: 0"),
        ("full", TransientFailure, "No space left on device"),
        ("worn disk", TransientFailure, "shard.tar: cannot be read"),
        ("closed", PermissionError, "not yours"),
        (("cannot be unpickled", Unreadable()), ZeroDivisionError, "there"),
    ],
    ids=str,
)
def test_every_error_between_task_and_result_comes_back_by_name(
    worker: Worker, task: object, kind: type[Exception], says: str
) -> None:
    """A worker that cannot answer would be taken for one that the system killed, or be waited for without end."""
    worker.send(task)
    with pytest.raises(kind, match=says) as caught:
        worker.receive()
    assert type(caught.value) is kind and "worker" in str(caught.value.__cause__)
    worker.send(4)
    assert worker.receive() == 8


def test_a_slow_worker_is_named_and_waited_for(worker: Worker, late: list[str]) -> None:
    worker.send("pid")
    process = worker.receive()
    worker.send(("sleep", 1.3))
    assert worker.receive() == ("sleep", 1.3) * 2
    assert late[0] == f"data: worker 3 (process {process}) has been at work for 0.5 s or more on task ('sleep', 1.3)"
    assert 1 <= len(late) <= 2


def test_signals_to_the_whole_job_do_not_end_a_worker(worker: Worker) -> None:
    worker.send("pid")
    process = worker.receive()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(process, number)
    worker.send(21)
    assert worker.receive() == 42


def test_the_end_of_its_user_ends_it_also_in_the_middle_of_a_task(worker: Worker) -> None:
    worker.send("pid")
    process = worker.receive()
    worker.send(("sleep", 100))
    started = time.monotonic()
    worker.stop()
    assert time.monotonic() - started < 3 and not alive(process)


def test_a_worker_may_have_many_files_on_their_way() -> None:
    """The limit is that of the server process, which is started under it."""
    program = (
        "from tests.support.worker_tasks import double\n"
        "from megabagel.data.load.workers import Worker\n"
        "import resource\n"
        "if __name__ == '__main__':\n"
        "    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))\n"
        "    with Worker('0', double, str, 60.0, print) as worker:\n"
        "        worker.send('open files')\n"
        "        print(*worker.receive())\n"
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    soft, hard = map(int, done.stdout.split())
    assert soft == min(hard, OPEN_FILES) > 200


@pytest.mark.parametrize("stopped", [False, True], ids=["at work", "stopped"])
def test_nothing_is_left_when_its_user_is_killed(stopped: bool) -> None:
    program = (
        "from tests.support.worker_tasks import double\n"
        "from megabagel.data.load.workers import Worker\n"
        "import time\n"
        "if __name__ == '__main__':\n"
        "    made = [Worker(str(n), double, str, 60.0, print) for n in range(2)]\n"
        "    for worker in made:\n"
        "        worker.send('pid')\n"
        "    print(*[worker.receive() for worker in made], flush=True)\n"
        "    made[0].send(('sleep', 100))\n"
        "    time.sleep(100)\n"
    )
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    user = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert user.stdout is not None
    workers = [int(number) for number in user.stdout.readline().split()]
    assert len(workers) == 2 and all(map(alive, workers))
    if stopped:  # does not see the end of its connection
        os.kill(workers[1], signal.SIGSTOP)
    user.kill()
    user.wait()
    user.stdout.close()
    assert until(lambda: not any(map(alive, workers)))
