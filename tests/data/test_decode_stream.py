"""GPU decoding runs on a stream of its own and is waited for: in which order, on stand-ins for CUDA's streams."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from megabagel.data.decode.dali import on_own_stream


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def synchronize(self) -> None:
        self.calls.append(f"wait for {self.name}")


class View:
    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def record_stream(self, stream: Stream) -> None:
        self.calls.append(f"read on {stream.name}")


def test_views_are_finished_before_images_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        calls.append(f"enter {stream.name}")
        yield
        calls.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(f"own of {device}", calls))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("default", calls))

    def work() -> Any:
        calls.append("decode")
        return [[View(calls)], None, [View(calls), View(calls)]]

    for _ in range(2):
        assert len(on_own_stream("cuda:3", work)) == 3
    once = ["enter own of cuda:3", "decode", "wait for own of cuda:3", "leave own of cuda:3", *["read on default"] * 3]
    assert calls == once * 2


def test_on_a_cpu_nothing_is_added() -> None:
    assert on_own_stream("cpu", lambda: [None]) == [None]
