"""What judges write, and what is read of it."""

import pytest

from megabagel.posttrain.judge_text import (
    NO_SCORE,
    OTHER_SCALE,
    OUT_OF_RANGE,
    RANGE,
    read_answer,
    read_regions,
    read_score,
)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 0.8", 0.8),
        ("score: 1", 1.0),
        ("Score: **0.8**", 0.8),
        ("**Score**: 0.8", 0.8),
        ("**Score: 0.8**", 0.8),
        ("Score: [0.8]", 0.8),
        ("Score: +0.5", 0.5),
        ("Score: .5", 0.5),
        ("Score: -.5", -0.5),
        ("Score: \u22120.5", -0.5),
        ("Score: \u20130.5", -0.5),
        ("Score: - 0.5", -0.5),
        ("Score: 0,8", 0.8),
        ("Score： 0.8", 0.8),
        ("Score = 0.8", 0.8),
        ('{"Score": 0.8}', 0.8),
        ("Score (relevance and quality): 0.8", 0.8),
        ("Overall Score: 0.8.", 0.8),
        ("Score: 0.8/1.0", 0.8),
        ("Score: 0.2\nScore: 0.9", 0.2),
        ("Score: -1.0 because it is wrong", -1.0),
        ("Score: 0.0", 0.0),
    ],
)
def test_a_score_is_read(text: str, score: float) -> None:
    assert read_score(text) == (score, None)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("Score: 95%", OTHER_SCALE),
        ("Score: 95 %", OTHER_SCALE),
        ("Score: 8/10", OTHER_SCALE),
        ("Score: 1/10", OTHER_SCALE),
        ("Score: 8 out of 10", OTHER_SCALE),
        ("Score: 9", OUT_OF_RANGE),
        ("Score: -1.5", OUT_OF_RANGE),
        ("Score: 0.5-0.9", RANGE),
        ("Score: 0.5 to 0.9", RANGE),
        ("Score: [A single number between -1.0 and 1.0]", NO_SCORE),
        ("Score: N/A", NO_SCORE),
        ("The picture is nice.", NO_SCORE),
        ("", NO_SCORE),
    ],
)
def test_what_is_no_score_is_refused_with_a_reason(text: str, failure: str) -> None:
    assert read_score(text) == (None, failure)


def test_regions_however_they_are_separated() -> None:
    for between in ("\n", "\n\n", "\n---\n", "\n\n---\n\n"):
        first, second = "**Region ID: 1**\nIdentified Object: a cat\nScore: 0.9", "**Region ID: 2**\nScore: -0.3"
        text = f"{first}{between}{second}\nReason: flat"
        found = read_regions(text)
        assert {n: (a.name, a.score, a.reason) for n, a in found.items()} == {
            1: ("a cat", 0.9, ""),
            2: ("", -0.3, "flat"),
        }


def test_a_reason_that_mentions_another_region_does_not_split_the_block() -> None:
    found = read_regions("Region ID: 1\nReason: touches Region 2: see there\nScore: 0.5\nRegion 2:\nScore: 0.1")
    assert {n: a.score for n, a in found.items()} == {1: 0.5, 2: 0.1}


def test_the_last_block_with_a_score_counts() -> None:
    assert read_regions("Region ID: 1\nScore: 0.1\nRegion ID: 1\nScore: 0.7")[1].score == 0.7
    assert read_regions("Region ID: 1\nScore: 0.1\nRegion ID: 1\nno more to add")[1].score == 0.1
    assert read_regions("Region ID: 3")[3].failure == NO_SCORE
    assert read_regions("All regions are fine.") == {}


def test_thoughts_are_not_answers() -> None:
    assert read_answer("<think>Score: -1</think>Score: 0.4\nReason: ok").score == 0.4
    assert read_answer("<think>Score: -1, let me see").failure == NO_SCORE
    assert read_regions("<think>Region ID: 7\nScore: 1.0</think>\n\nRegion ID: 1\nScore: 1").keys() == {1}


def test_reasons_and_impressions() -> None:
    assert read_answer("Score: -0.7 because of the cat").reason == "because of the cat"
    assert read_answer("Reason: good\nScore: 0.3").reason == "good"
    whole = read_answer("Overall Impression: fine\nScore: **0.95**\nReason: good light")
    assert (whole.name, whole.score, whole.reason) == ("fine", 0.95, "good light")
