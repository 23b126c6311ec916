"""Who is to blame, from hand-made signs of life."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import Tensor

from megabagel.runtime import phase
from megabagel.runtime.diagnosis import Beat, judge


def beat(**changes: Any) -> Beat:
    base = Beat(n=5, host="node", step=7, phase="forward", age=0.5, marks=90, collective=None, at="x.py:1 f")
    return {**base, **changes}  # type: ignore[typeddict-item]


WAITING = {"age": 100.0, "collective": "all_reduce", "at": "step.py:9 _reduce"}


def test_all_is_well() -> None:
    beats = {0: beat(), 1: beat(age=99.0), 2: beat(age=99.0, collective="barrier")}
    assert judge(beats, {0: 1.0, 1: 9.9, 2: 0.0}, patience=10.0, timeout=100.0) is None


def test_a_silent_rank_is_dead_or_stopped() -> None:
    beats = {0: beat(**WAITING), 1: beat(phase="data", host="gpu7, process 12"), 2: beat()}
    said = judge(beats, {0: 0.0, 1: 10.1, 2: 1.0}, patience=10.0, timeout=50.0)
    assert said is not None and said.startswith(
        "no sign of life for 10 s: rank 1 (gpu7, process 12) is dead or stopped, last seen in phase data after step 7"
    )
    assert "Meanwhile rank 0 waits in phase forward after step 7, in all_reduce at step.py:9 _reduce" in said


def test_the_rank_outside_of_collectives_hangs() -> None:
    beats = {0: beat(**WAITING, marks=3), 1: beat(age=99.0, phase="data", at="loader.py:5 steps"), 2: beat(**WAITING)}
    said = judge(beats, dict.fromkeys(beats, 0.0), patience=10.0, timeout=99.5)
    assert said is not None
    blamed, _, others = said.partition("Meanwhile")
    assert "rank 1 (node) hangs in phase data after step 7 at loader.py:5 steps" in blamed and "rank 0" not in blamed
    assert "rank 0 waits" in others and "rank 2 waits" in others


def test_of_ranks_in_different_collectives_the_one_behind_hangs() -> None:
    barrier = {**WAITING, "collective": "barrier", "marks": 88}
    beats = {0: beat(**WAITING), 1: beat(**barrier), 2: beat(**WAITING)}
    said = judge(beats, dict.fromkeys(beats, 0.0), patience=10.0, timeout=99.0)
    assert said is not None and "rank 1 (node) hangs in phase forward after step 7, in barrier" in said.split("Mean")[0]
    beats = {0: beat(**WAITING), 1: beat(**WAITING), 2: beat(**{**WAITING, "step": 6})}
    said = judge(beats, dict.fromkeys(beats, 0.0), patience=10.0, timeout=99.0)
    assert said is not None and "rank 2 (node) hangs in phase forward after step 6" in said.split("Mean")[0]


def test_where_waiting_shows_nowhere_the_one_behind_hangs() -> None:
    """On a GPU all of them wait for the device, in no collective."""
    beats = {rank: beat(age=99.0, marks=86 if rank == 5 else 90) for rank in range(8)}
    said = judge(beats, dict.fromkeys(beats, 0.0), patience=10.0, timeout=98.0)
    assert said is not None
    blamed, _, others = said.partition("Meanwhile")
    assert blamed.count("hangs") == 1 and "rank 5 (node) hangs" in blamed
    assert others.count("rank ") == 4 and "and 3 more" in others


def test_waiting_for_the_result_of_a_collective_shows() -> None:
    class Device(Tensor):
        def cpu(self) -> Any:
            with ThreadPoolExecutor(1) as pool:  # as the heart does
                found.append(pool.submit(phase.locate).result())
            return self

    found: list[phase.Location] = []
    phase.all_reduced(Device())
    ((collective, _),) = found
    assert collective == "all_reduced"


def test_a_sign_of_life_is_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks draw different numbers of tensors, and yet their marks can be compared."""
    monkeypatch.setattr(phase, "now", phase.Progress(phase="build", marks=3, since=-100.0))
    phase.keepalive()
    assert (phase.now.marks, phase.now.phase) == (3, "build") and phase.now.since > -100.0


def test_a_rank_that_moves_is_not_blamed() -> None:
    beats = {0: beat(age=2.0), 1: beat(**WAITING)}
    said = judge(beats, {0: 0.0, 1: 0.0}, patience=10.0, timeout=99.0)
    assert said is not None and "rank 0" not in said


def test_a_message_about_many_ranks_stays_short() -> None:
    beats = {rank: beat() for rank in range(100)}
    said = judge(beats, dict.fromkeys(beats, 60.0), patience=10.0, timeout=99.0)
    assert said is not None and "and 96 more" in said and len(said) < 600
