"""Another process at the job's store: without the secret its writes change nothing, though it can list every key."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from psutil import Process

from megabagel.errors import RankLost
from megabagel.runtime.signed_store import SignedStore
from tests.faults.test_lost_ranks import KILLED, SOON, Jobs
from tests.support.cli_harness import metrics, pairs, tiny_run

ROOT = Path(__file__).parents[2]
STRANGER = """
import os, sys
import torch.distributed as dist

assert "MEGABAGEL_JOB_SECRET" not in os.environ
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False)
ours = [key for key in store.list_keys() if any(word in key for word in ("beat-", "roll", "here-", "facts-", "seen-"))]
group = next(key for key in ours if "beat-0" in key).rpartition("beat-0")[0]
beat = store.get(group + "beat-0")
mac, text = beat[:64].decode(), '"rank 1 is dead\\x1b[2J"'
for name in ("verdict", "suspect", "left-0", "left-1", "roll"):
    for value in (text, mac + text, "0" * 64 + text, beat.decode()):
        store.set(group + name, value)
for key in ours:
    store.set(key, beat.decode() if "beat-1" in key else "x" * 80)
print(len(ours))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"), pairs(6))


@pytest.fixture
def jobs(tmp_path: Path, tiny: Path) -> Iterator[Jobs]:
    jobs = Jobs(tmp_path, tiny)
    yield jobs
    for job in jobs.started:
        job.kill()


def attack(port: int) -> int:
    env = {name: value for name, value in os.environ.items() if name != "MEGABAGEL_JOB_SECRET"}
    command = [sys.executable, "-c", STRANGER, str(port)]
    return int(subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout)


def test_a_stranger_neither_ends_a_run_nor_hides_its_end(jobs: Jobs) -> None:
    job = jobs.start()
    jobs.until(job, 2)
    (listening,) = {
        entry.laddr.ip
        for entry in Process(job.ranks[0].pid).net_connections("tcp")
        if entry.status == "LISTEN" and entry.laddr.port == job.port
    }
    assert listening == "127.0.0.1"
    assert attack(job.port) >= 2 * 4
    jobs.until(job, len(metrics(jobs.run)) + 100)
    job.signal(signal.SIGKILL, 1)
    assert job.wait(SOON) == {0: RankLost.code, 1: KILLED}
    assert "rank 1 (" in job.texts[0] and "is dead or stopped" in job.texts[0]
    assert not any("\x1b" in text or "rank 1 is dead" in text for text in job.texts)


def test_what_is_signed_for_one_key_group_or_job_is_no_value_elsewhere() -> None:
    plain = dist.HashStore()
    mine = SignedStore(plain, "1.0.0", b"s")
    mine.set("a", {"x": [1, None]})
    assert mine.get("a") == {"x": [1, None]} and mine.get("b") is None
    signed = plain.get("1.0.0/a")
    for key in ("1.0.0/b", "2.0.0/a"):
        plain.set(key, signed.decode())
    assert mine.get("b") is None and SignedStore(plain, "2.0.0", b"s").get("a") is None
    assert SignedStore(plain, "1.0.0", b"other").get("a") is None
    assert mine.get_many(["a", "b"]) == {"a": {"x": [1, None]}}


@pytest.mark.parametrize("planted", ["", "x", "\N{SNOWMAN}" * 70, "0" * 64 + '"mine"'])
def test_a_claim_replaces_what_is_not_signed_and_yields_to_what_is(planted: str) -> None:
    plain = dist.HashStore()
    store = SignedStore(plain, "", b"s")
    plain.set("verdict", planted)
    assert store.claim("verdict", "first") == "first"
    assert store.claim("verdict", "second") == "first" == store.get("verdict")


def test_an_older_beat_is_no_news() -> None:
    """A stranger may write again what a rank has written: a dead rank stays dead."""
    from megabagel.runtime.diagnosis import read_beat

    beat = {"n": 1, "host": "a\x1b", "step": 2, "phase": "data", "age": 0.5, "marks": 3, "collective": None, "at": "b"}
    read = read_beat(beat)
    assert read is not None and read["host"] == "a\\x1b"
    for wrong in ({**beat, "n": "1"}, {**beat, "age": float("nan")}, {**beat, "more": 1}, [], {**beat, "at": None}):
        assert read_beat(wrong) is None
