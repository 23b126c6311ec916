"""One owner per folder: who comes second is refused or waits, also after kill -9, and learns who the first one is."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megabagel import locks
from megabagel.checkpoint.hf.folder import new_folder
from megabagel.data.builders.prepare import prepare
from megabagel.errors import TransientFailure, UserError
from megabagel.locks import beside, inside, locked

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from megabagel.locks import locked
with locked(Path(sys.argv[1]), "x"):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def holder(file: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, file], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    with process, process.stdout:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE_S", 0.2)


def test_second_owner_is_refused_by_name_until_the_first_is_killed(tmp_path: Path) -> None:
    file = inside(tmp_path / "run")
    with holder(file) as first:
        for _ in range(2):
            with pytest.raises(
                UserError, match=rf"^out: in use by process {first.pid} on .* since 2.*wait for its end"
            ):
                locked(file, "out").__enter__()
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert file.exists(), "a killed process leaves it"
        with locked(file, "out"):
            assert str(os.getpid()) in file.read_text()
    assert not file.exists()


def test_a_restarted_job_waits_for_the_end_of_its_predecessor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    file, alive = inside(tmp_path), threading.Event()
    with holder(file) as first:
        with pytest.raises(TransientFailure, match=f"in use by process {first.pid}"):
            locked(file, "out", restart_wait=0.3).__enter__()
        threading.Timer(0.5, first.kill).start()
        began = time.monotonic()
        with locked(file, "out", restart_wait=60, alive=alive.set):
            assert 0.3 < time.monotonic() - began < 30 and alive.is_set()
    assert f"in use by process {first.pid}" in caplog.text and "waiting up to 60 s" in caplog.text


def test_one_of_many_holds_it_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is removed by each owner, and who waited must not go by the removed one."""
    monkeypatch.setattr(locks, "PATIENCE_S", 60.0)
    monkeypatch.setattr(locks, "_POLL_S", 0.001)
    inner = threading.Lock()
    clashes = []

    def work() -> None:
        for _ in range(20):
            with locked(inside(tmp_path), "out"):
                clashes.append(not inner.acquire(blocking=False))
                time.sleep(0.0005)
                inner.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clashes) == 80 and not any(clashes)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"pid": 1, "host": "\\u001b[2J", "since": 0, "command": 0}']
)
def test_an_owner_that_left_no_name(tmp_path: Path, content: bytes) -> None:
    file = inside(tmp_path)
    with holder(file):
        file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            locked(file, "out").__enter__()
    assert "in use by" in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with locked(inside(tmp_path), "out"):
        pass
    assert "has no locks" in caplog.text


def test_two_writers_of_one_new_folder(tmp_path: Path) -> None:
    """import-hf, export-hf and reshard: the second would remove what the first has written so far."""
    out = tmp_path / "out"
    with holder(beside(out)), pytest.raises(UserError, match=f"^{out}: in use by"), new_folder(out, 1):
        raise AssertionError
    with new_folder(out, 1) as folder:
        (folder / "x").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_shards(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    out = tmp_path / "out"
    with holder(inside(out)), pytest.raises(UserError, match=f"^{out}: in use by"):
        prepare(tmp_path / "in", out, samples_per_shard=1, name="shards")
