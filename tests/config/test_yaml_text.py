"""Scalars as people mean them, limits on what a text may ask for, and values that survive being written."""

from pathlib import Path
from typing import Any

import pytest

from megabagel.config.load import load
from megabagel.config.yaml_text import YamlError, dump_yaml, load_word, load_yaml
from megabagel.errors import UserError

TINY = Path(__file__).parents[2] / "examples" / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x10", 16),
        ("-0x10", "-0x10"),
        ("0b11", "0b11"),
        ("1:30", "1:30"),
        ("1:30:00", "1:30:00"),
        ("1_000", "1_000"),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("+3", 3),
        ("-.inf", float("-inf")),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("~", None),
        ("", None),
        ("2026-01-01", "2026-01-01"),
        ("{a: [1, 2.5], b: ~}", {"a": [1, 2.5], "b": None}),
    ],
)
def test_scalars_of_yaml_1_2(text: str, value: Any) -> None:
    found = load_yaml(text)
    assert found == value and type(found) is type(value)


def test_a_number_sign_in_a_word_is_no_comment() -> None:
    assert load_word("runs/a #1") == "runs/a #1"
    assert load_word("'runs/a #1'") == "runs/a #1"
    assert load_word("5 # five") == "5 # five"
    assert load_word("[1, 2] # two") == [1, 2]
    assert load_word("a#1") == "a#1"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values"),
        ("a: &a [*a]", "an alias stands inside of what it repeats"),
        ("[" * 3000, "nested too deeply; expected at most 64 levels"),
        ("{a: " * 500, "nested too deeply"),
        ("- " * 500 + "x", "nested too deeply"),
        ("0x" + "f" * 5000, "more than 64 digits"),
        ("9" * 5000, "more than 64 digits"),
        ("9" * 30, "beyond"),
        ("9." + "9" * 5000, "more than 400 characters"),
        ("!!bool maybe", "is no value"),
        ("!!int x", "is no value"),
        ("!!timestamp 2026-02-30", "is no value"),
        ('"\\U00110000"', ""),
        ("a: 1\na: 2", "key 'a' is given twice"),
        ("a\0b", "special characters are not allowed"),
    ],
)
def test_a_text_that_asks_for_too_much_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(YamlError, match=message) as caught:
        load_yaml(text)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_texts_survive_being_written() -> None:
    texts = ["010", "1e5", "0o7", "on", "1:30", "~", "", "null", "a #b", "0x1", ".5", "<<", "2026-01-01", "a: b"]
    assert load_yaml(dump_yaml(texts)) == texts
    numbers = [1e-15, 1e300, 0.1, -3, 2**62, 1e22]
    assert load_yaml(dump_yaml(numbers)) == numbers


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.steps=1:30", "train.steps = '1:30': expected an integer"),
        ("run.dir=~/runs/a", "~ is not replaced here"),
        ("run.dir=$SCRATCH/a", "$SCRATCH is not replaced here"),
        ("data.root=${HOME}/a", "${HOME} is not replaced here"),
        ('run.dir="a\\0b"', "without control characters"),
        ("parallel.tp=1000000007", "at most 1048576"),
        ("data.lookahead=1000000000", "at most 1048576"),
        ("train.warmup=100000000000000", "at most 1099511627776"),
        ("run.timeout=1e300", "at most 10000000.0"),
        ("model.layers=1000000000", "at most 4096"),
        ("data.sources.0.weight=1e308", "at most 1000000000000.0"),
    ],
)
def test_a_value_that_cannot_be_meant_is_refused_by_key(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(TINY, [word])
    assert message in str(caught.value)


def test_an_override_is_taken_as_written() -> None:
    config = load(TINY, ["train.steps=010", "run.dir=runs/a #1", "train.warmup=2"])
    assert (config.train.steps, config.run.dir) == (10, "runs/a #1")


def test_thousands_of_problems_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train:\n" + "".join(f"  k{n}: 1\n" for n in range(2000)))
    with pytest.raises(UserError) as caught:
        load(tmp_path / "a.yaml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 52 and lines[-1].strip() == "... and 1951 more"


@pytest.mark.parametrize("base", ["fifo", "/dev/zero", '"a\\0b"', "gone.yaml", "."])
def test_a_base_is_a_regular_file(tmp_path: Path, base: str) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a.yaml").write_text(f"base: {base}\n")
    with pytest.raises(UserError):
        load(tmp_path / "a.yaml")
