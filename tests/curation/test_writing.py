"""Texts of documents in parts."""

import pytest

from megabagel.curation.draft import Draft, Text
from megabagel.curation.samples import text_parts


def parts(text: str, longest: int) -> list[str]:
    return [files["txt"].decode() for _, files in text_parts(Draft("key", (Text(text),)), longest)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two\n\nthree\n\nfour", ["one two", "three\n\nfour"]),
        ("one two three four", ["one two", "three four"]),
        ("one\ntwo three\tfour", ["one\ntwo", "three\tfour"]),
        ("one two three\n\nfour", ["one two", "three\n\nfour"]),
        ("abcdefghijklmno pq\n\nr", ["abcdefghijk", "lmno pq\n\nr"]),
        ("abcdefghijk lm", ["abcdefghijk", "lm"]),
        ("abcdefghijkl m", ["abcdefghijk", "l m"]),
    ],
)
def test_parts_are_no_longer_than_asked_and_end_with_a_paragraph_or_a_word(text: str, expected: list[str]) -> None:
    assert parts(text, 11) == expected


def test_long_paragraphs_lose_no_word() -> None:
    text = " ".join(f"word{n}" for n in range(2000)) + "\n\nend"
    found = parts(text, 500)
    assert max(map(len, found)) <= 500
    assert " ".join(found).split() == text.split()
