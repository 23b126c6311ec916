"""Local ranks, with tiny workers: their environment, what is shown, how they end, and that none is left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megabagel.errors import STOP_PREFIX, RankLost
from megabagel.runtime import launch

HERE = Path(__file__).parents[2]
PLACE = "import os, signal, sys, time; rank = int(os.environ['RANK'])"


def start(body: str, nproc: int, **env: str) -> "subprocess.Popen[str]":
    """Run `spawn` in a process of its own, as the command line does; each rank runs `body` after `PLACE`."""
    command = [sys.executable, "-c", f"{PLACE}\n{body}"]
    main = f"import sys; from megabagel.runtime.launch import spawn; sys.exit(spawn({command!r}, {nproc}))"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-c", main],
        env={**clean, **env},
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launched(body: str, nproc: int, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a launch."""
    process = start(body, nproc, **env)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def wait_for(files: list[Path]) -> list[int]:
    """Wait until every rank has written its process id."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if all(file.exists() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 5.0) -> bool:
    """Whether all processes end within `seconds`."""
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_ranks_find_their_place(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"]
    body = f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert launched(body, 3)[0] == 0
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    port = found[0][5]
    threads = str(max(1, len(os.sched_getaffinity(0)) // 3))
    assert 1024 < int(port) < 65536
    assert found == [[str(r), str(r), "3", "3", "127.0.0.1", port, threads] for r in range(3)]


def test_a_thread_count_of_the_user_is_kept() -> None:
    assert launched("print(os.environ['OMP_NUM_THREADS'])", 2, OMP_NUM_THREADS="5")[1] == "5\n"


def test_rank_0_is_shown_as_it_is_and_others_by_their_marked_stderr() -> None:
    code, out, err = launched("print('out', rank); print(f'err {rank}\\nmore', file=sys.stderr)", 3)
    assert code == 0
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == sorted(
        ["err 0", "more", "[rank 1] err 1", "[rank 1] more", "[rank 2] err 2", "[rank 2] more"]
    )


def test_a_line_that_names_its_rank_is_marked_once() -> None:
    err = launched("print(f'[rank {rank}] late', file=sys.stderr)", 2)[2]
    assert sorted(err.splitlines()) == ["[rank 0] late", "[rank 1] late"]


def test_stderr_of_other_ranks_is_shown_at_once() -> None:
    process = start("if rank: print('hello', file=sys.stderr, flush=True); time.sleep(60)\ntime.sleep(60)", 2)
    assert process.stderr is not None
    assert process.stderr.readline() == "[rank 1] hello\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    process.communicate()


@pytest.mark.parametrize(
    ("death", "code", "how"),
    [
        ("sys.exit(7)", 7, "exit code 7"),
        ("raise ValueError('boom')", 1, "exit code 1"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "signal SIGKILL"),
    ],
)
def test_one_failing_rank_ends_all(tmp_path: Path, death: str, code: int, how: str) -> None:
    body = (
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\n"
        f"if rank == 2:\n    while len(os.listdir({str(tmp_path)!r})) < 3: time.sleep(0.01)\n    {death}\n"
        "time.sleep(60)"
    )
    begin = time.monotonic()
    found, _, err = launched(body, 3)
    assert found == code
    assert f"megabagel: rank 2 ended with {how}; stopping the others" in err
    assert ("[rank 2] ValueError: boom" in err) == ("boom" in death)
    assert time.monotonic() - begin < 8
    assert gone([int(file.read_text()) for file in tmp_path.iterdir()], seconds=0)


def test_the_first_failure_gives_the_exit_code() -> None:
    """Rank 0 breaks only because rank 1 has left; that is not the news."""
    body = "if rank == 1: sys.exit(3)\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\ntime.sleep(60)"
    assert launched(body, 2)[0] == 3


MISTAKE = "print(f'megabagel: error: {text}\\n  second line', file=sys.stderr, flush=True); sys.exit(2)"


def test_a_mistake_of_all_ranks_is_shown_once() -> None:
    body = f"text = 'x.yaml: 1 problem'\ntime.sleep(0.3 if rank == 0 else 0)\n{MISTAKE}"
    code, _, err = launched(body, 4)
    assert code == 2
    assert err == "megabagel: error: x.yaml: 1 problem\n  second line\n"


def test_a_mistake_that_rank_0_does_not_make_is_shown_once() -> None:
    body = f"text = 'no shard'\nif rank == 0: time.sleep(60)\nprint('warning', rank, file=sys.stderr)\n{MISTAKE}"
    code, _, err = launched(body, 3)
    assert code == 2
    lines = err.splitlines()
    assert sorted(line for line in lines if "warning" in line) == ["[rank 1] warning 1", "[rank 2] warning 2"]
    assert [line for line in lines if "warning" not in line] == [
        "[rank 1] megabagel: error: no shard",
        "[rank 1]   second line",
    ]


def test_the_traceback_of_a_worker_is_shown_whichever_rank_it_was_of() -> None:
    """All ranks end alike, and the cause is on one of them."""
    trace = (
        "if rank: print('Traceback (most recent call last):\\n  x\\nRuntimeError: self.stride(-1)', file=sys.stderr)"
    )
    code, _, err = launched(f"text = 'a worker died'\n{trace}\n{MISTAKE}", 2)
    assert code == 2 and err.count("[rank 1] RuntimeError: self.stride(-1)") == 1
    assert err.count("megabagel: error: a worker died") == 1


def test_a_mistake_is_shown_without_what_it_did_to_others() -> None:
    """Rank 1 breaks and ends before rank 0, which left it, is through with its own end."""
    hook = "sys.excepthook = lambda *_: print(f'[rank{rank}]: Traceback (most recent call last)\\nx', file=sys.stderr)"
    body = f"{hook}\nif rank: raise RuntimeError\ntext = 'full'\ntime.sleep(0.5)\n{MISTAKE}"  # as torch's hook
    code, _, err = launched(body, 3)
    assert code == 2
    assert err == "megabagel: error: full\n  second line\n"


def test_a_traceback_that_a_rank_survives_is_shown() -> None:
    body = "import traceback\nif rank:\n    try: 1 / 0\n    except Exception: traceback.print_exc()"
    code, _, err = launched(body, 2)
    assert code == 0
    assert err.startswith("[rank 1] Traceback")
    assert err.endswith("[rank 1] ZeroDivisionError: division by zero\n")


def test_a_line_like_a_mistake_is_not_lost_when_the_rank_fails_otherwise() -> None:
    code, _, err = launched("if rank: print('megabagel: error: x', file=sys.stderr); sys.exit(1)\ntime.sleep(60)", 2)
    assert code == 1
    assert "[rank 1] megabagel: error: x\n" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_every_rank(tmp_path: Path, number: signal.Signals) -> None:
    """Ranks that answer a signal by ending well make the launch end well."""
    body = (
        "def note(number, _):\n"
        f"    open(os.path.join({str(tmp_path)!r}, f'got{{rank}}'), 'w').write(str(number))\n    sys.exit(0)\n"
        f"signal.signal({int(number)}, note)\n"
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    process = start(body, 2)
    pids = wait_for([tmp_path / "0", tmp_path / "1"])
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert [(tmp_path / f"got{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert gone(pids, seconds=0)


def test_a_rank_that_ignores_sigterm_is_killed_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_TERM_S", 0.3)
    child = "import time; time.sleep(60)"
    body = (
        "import subprocess\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"path = os.path.join({str(tmp_path)!r}, 'pids')\n"
        f"if rank == 0:\n    while not os.path.exists(path): time.sleep(0.01)\n    sys.exit(5)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "open(path + '.new', 'w').write(f'{os.getpid()} {child.pid}')\nos.rename(path + '.new', path)\ntime.sleep(60)"
    )
    assert launch.spawn([sys.executable, "-c", f"{PLACE}\n{body}"], 2) == 5
    assert gone([int(pid) for pid in (tmp_path / "pids").read_text().split()], seconds=1)


def test_a_rank_that_lost_another_is_not_to_blame() -> None:
    body = f"if rank == 0: sys.exit({RankLost.code})\ntime.sleep(0.3)\nos.kill(os.getpid(), signal.SIGKILL)"
    code, _, err = launched(body, 2)
    assert code == 128 + signal.SIGKILL
    assert err == "megabagel: rank 1 ended with signal SIGKILL; stopping the others\n"


def test_ranks_that_others_gave_up_on_are_killed_at_once(tmp_path: Path) -> None:
    """A stopped process does not heed SIGTERM; waiting for it would be in vain."""
    body = (
        f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\n"
        f"if rank == 0: print('{STOP_PREFIX}rank 1 hangs', file=sys.stderr); sys.exit({RankLost.code})\n"
        "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    started = time.monotonic()
    code, _, err = launched(body, 2)
    assert code == RankLost.code and err == f"{STOP_PREFIX}rank 1 hangs\n"
    assert time.monotonic() - started < launch._SETTLE_S + launch._TERM_S
    assert gone([int((tmp_path / "1").read_text())], seconds=0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans on Linux only")
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    body = f"open(os.path.join({str(tmp_path)!r}, str(rank)), 'w').write(str(os.getpid()))\ntime.sleep(60)"
    process = start(body, 2)
    pids = wait_for([tmp_path / "0", tmp_path / "1"])
    process.kill()
    process.communicate(timeout=30)
    assert gone(pids)


def test_a_signal_that_comes_while_ranks_start_reaches_all_of_them() -> None:
    """Held back by the caller, and by ranks until they have handlers: nobody ends by the signal itself."""
    body = (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); time.sleep(0.3 * rank)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])\ntime.sleep(60)"
    )
    command = [sys.executable, "-c", f"{PLACE}\n{body}"]
    main = (
        "import os, signal, sys; from megabagel.runtime.launch import spawn\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(spawn({command!r}, 2))"
    )
    done = subprocess.run([sys.executable, "-c", main], cwd=HERE, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, ""), done


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert launch.spawn([sys.executable, "-c", ""], 2) == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_ports_are_free() -> None:
    assert re.fullmatch(r"\d+", str(launch._free_port()))
    assert launch._free_port() > 1023
