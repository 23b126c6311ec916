"""Joining a job and leaving it: what ends together, and what ends alone."""

import threading
import time
from typing import Any

import pytest
import torch.distributed as dist

from megabagel.config.schema import RunConfig
from megabagel.errors import Preempted, RankLost, UserError
from megabagel.parallel import mesh
from megabagel.runtime import cpu_backend, heartbeat
from megabagel.runtime.signed_store import SignedStore


@pytest.mark.parametrize(
    ("error", "left"), [(None, True), (UserError, True), (Preempted, True), (ZeroDivisionError, False)]
)
def test_who_fails_alone_does_not_wait_for_others(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, left: bool
) -> None:
    """Leaving the group may wait for other ranks, which would hide the failure from them."""
    told: list[str] = []
    explain = heartbeat._Heartbeat.explain

    def noted(life: Any, failure: Exception) -> str | None:
        told.append(f"{'left' if not dist.is_initialized() else 'joined'}")
        return explain(life, failure)

    monkeypatch.setattr(heartbeat._Heartbeat, "explain", noted)
    monkeypatch.setattr(cpu_backend, "install", lambda: None)
    assert not dist.is_initialized()
    try:
        with mesh.joined():
            if error is not None:
                raise error("a failure")
    except Exception as raised:
        assert type(raised) is error
    try:
        assert dist.is_initialized() is not left
        assert told == ([] if left else ["joined"])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("error", "waits"), [(None, True), (UserError, True), (Preempted, True), (ZeroDivisionError, False)]
)
def test_the_store_stays_for_ranks_that_need_longer_to_end(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception] | None, waits: bool
) -> None:
    """Where all end alike; who is lost does not come any more."""
    monkeypatch.setattr(heartbeat, "_FAREWELL_S", 0.2)
    store = SignedStore(dist.HashStore())
    gone = threading.Timer(1.0, lambda: store.set("left-1", ""))
    gone.start()
    began = time.monotonic()
    try:
        with heartbeat.watching(store, 0, 2, RunConfig(heartbeat_timeout=20.0)):
            if error is not None:
                raise error("a failure")
    except Exception as raised:
        assert type(raised) is error or isinstance(raised, RankLost)
    seconds = time.monotonic() - began
    gone.join()
    assert (0.9 < seconds < 10) if waits else seconds < 0.9
