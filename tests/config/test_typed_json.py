"""JSON that is read back: strict parsing, types and ranges, one message that names the place."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from megabagel.config.typed_json import Count, Positive, Share, WrongValue, is_file_name, parse, read_as


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": {"b": 1, "b": 2}}', "key 'b' is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"{", "Expecting"),
        (b"\xff", "codec"),
        (b"1" * 5000, "digits"),
        (b"", "Expecting"),
    ],
)
def test_what_is_no_json(text: bytes, message: str) -> None:
    with pytest.raises(WrongValue, match=message):
        parse(text)


@dataclass(frozen=True)
class Inner:
    at: tuple[Count, Count]
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    step: Count
    share: Share
    kind: Literal["a", "b"]
    inner: dict[str, Inner]
    many: tuple[Positive, ...] = ()


GOOD: dict[str, Any] = {"step": 3, "share": 1, "kind": "a", "inner": {"x": {"at": [0, 1]}}, "later": "left alone"}


def test_a_right_value_becomes_typed() -> None:
    assert read_as(Outer, GOOD) == Outer(3, 1.0, "a", {"x": Inner((0, 1))})
    assert read_as(Outer, GOOD | {"inner": {}, "many": [1, 2]}).many == (1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step is -1; expected a whole number of at least 0"),
        ({"step": "3"}, "step is '3'; expected a whole number"),
        ({"step": 3.0}, "step is 3.0; expected a whole number"),
        ({"step": True}, "step is True; expected a whole number"),
        ({"step": None}, "step is None; expected a whole number"),
        ({"step": 10**400}, "step is a very large number"),
        ({"share": 1.5}, "share is 1.5; expected a finite number of at least 0 and at most 1"),
        ({"share": "0.5"}, "share is '0.5'"),
        ({"kind": "c"}, "kind is 'c'; expected 'a' or 'b'"),
        ({"kind": ["a"]}, "kind is a list of 1"),
        ({"inner": []}, "inner is a list of 0; expected an object"),
        ({"inner": {"x": {}}}, "inner.x.at is missing; expected a list of 2"),
        ({"inner": {"x": {"at": [0]}}}, "inner.x.at is a list of 1; expected a list of 2"),
        ({"inner": {"x": {"at": [0, -7]}}}, "inner.x.at.1 is -7"),
        ({"inner": {"x": {"at": [0, 1], "name": 7}}}, "inner.x.name is 7"),
        ({"many": [1, 0]}, "many.1 is 0; expected a whole number of at least 1"),
        ({"kind": "\x1b[31m"}, r"kind is '\x1b[31m'"),
    ],
)
def test_a_wrong_value_is_named_by_its_place(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongValue) as caught:
        read_as(Outer, GOOD | change)
    assert message in str(caught.value)


def test_names_of_files_in_a_folder() -> None:
    assert all(map(is_file_name, ("a", "rank_00000.safetensors", "official/my file ü.json")))
    bad = ("", "/a", "../a", "a/../b", "a//b", ".", "a\0b", "a\nb", "x" * 300, "\ud800", "a/" * 3000 + "b", "a\\b")
    assert not any(map(is_file_name, bad))
