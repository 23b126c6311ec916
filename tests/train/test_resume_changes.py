"""What differs from the checkpoint's config is logged key by key; odd lines in files of a run do not stop a start."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megabagel.config.load import dump
from megabagel.config.typed_json import WrongValue, read_as
from megabagel.data.plan_state import PlanState
from megabagel.train.records import MetricsFile
from megabagel.train.resume_changes import log_changes
from tests.support.cli_harness import TINY
from tests.support.config_tree import change


def test_every_changed_key_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dump(change(TINY, {"train.ema": 0.5}), tmp_path / "config.yaml")
    source = replace(TINY.data.sources[0], weight=2.0)
    now = change(TINY, {"train.ema": 0.0, "train.lr": 0.5, "data.sources": (source,), "run.dir": "elsewhere"})
    with caplog.at_level(logging.INFO):
        log_changes(tmp_path, now)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[:4] == [
        "changed since the checkpoint: run.dir: 'runs/default' -> 'elsewhere'",
        "changed since the checkpoint: data.sources.0.weight: 1.0 -> 2.0",
        "changed since the checkpoint: train.lr: 0.001 -> 0.5",
        "changed since the checkpoint: train.ema: 0.5 -> 0.0",
    ]
    assert "not bit for bit" in lines[4] and "averaged weights" in lines[5] and len(lines) == 6


def test_what_changes_no_number_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dump(TINY, tmp_path / "config.yaml")
    log_changes(tmp_path, TINY)
    assert caplog.text == ""
    log_changes(tmp_path, change(TINY, {"data.workers": 2, "checkpoint.every": 3}))
    assert len(caplog.records) == 2 and "bit for bit" not in caplog.text


@pytest.mark.parametrize("text", [None, b"\xff", b"[" * 5000])
def test_a_config_that_cannot_be_compared_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: bytes | None
) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_bytes(text)
    log_changes(tmp_path, TINY)
    assert "cannot be compared" in caplog.text


def test_odd_lines_of_metrics_are_dropped_by_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    odd = [b"[]", b"null", b"\xff\xfe", b"{}", b'{"step": "2"}', b'{"step": -1}', b'{"step": NaN}', b"[" * 50_000, b""]
    good = [b'{"step": 1, "loss": NaN}', b'{"step": 2}']
    path.write_bytes(b"\n".join([good[0], *odd, good[1], b'{"step": 3}', b'{"step": 2, "lo']))
    metrics = MetricsFile(path, 2)
    metrics.write({"step": 3})
    metrics.close()
    assert path.read_bytes().splitlines() == [*good, b'{"step": 3}']
    assert f"{len(odd)} lines that are no record of a step were dropped" in caplog.text


GOOD = {
    "fingerprint": {"a": "f"},
    "seed": 0,
    "step": 3,
    "draws": 9,
    "cursors": {"a": [1, 4]},
    "begun": {"a": [1, 8]},
    "window": [["a", 7, 1]],
    "skipped": {},
}


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"step": -1}, "plan.step"),
        ({"draws": "9"}, "plan.draws"),
        ({"draws": -9}, "plan.draws"),
        ({"cursors": {"a": [1, -4]}}, "plan.cursors.a.1"),
        ({"cursors": {"a": [-1, 4]}}, "plan.cursors.a.0"),
        ({"cursors": {"a": [1.5, 4]}}, "plan.cursors.a.0"),
        ({"cursors": {}}, "plan.cursors is of"),
        ({"begun": {"a": [1, 10**9]}}, "plan.begun"),
        ({"begun": {"a": [2, 8]}}, "plan.begun"),
        ({"begun": {"b": [1, 1]}}, "plan.begun"),
        ({"begun": {"a": "x"}}, "plan.begun.a"),
        ({"window": [["a", 8, 1]]}, "plan.window.0"),
        ({"window": [["b", 0, 0]]}, "plan.window.0"),
        ({"window": [["a", -1, 0]]}, "plan.window.0.1"),
        ({"window": [["a", 1]]}, "plan.window.0"),
        ({"window": "a"}, "plan.window"),
        ({"skipped": {"a": "1"}}, "plan.skipped.a"),
        ({"fingerprint": ["f"]}, "plan.fingerprint"),
    ],
)
def test_a_place_in_the_data_that_cannot_be_is_refused(changes: dict[str, object], place: str) -> None:
    read_as(PlanState, GOOD, "plan").check({"a": 8})
    with pytest.raises(WrongValue, match=place):
        read_as(PlanState, GOOD | changes, "plan").check({"a": 8})
