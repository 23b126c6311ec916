"""Reading of a judge's answer: scores per region, of the layout, or of the whole picture.

Models write `**Score**: [+0.5]`, `Score: .5`, a typographic minus, or `---` between regions without blank lines. All of
that is read. What is no number from -1 to 1 (`95%`, `8/10`, `9`) is refused: guessing its scale would train on a wrong
weight. A failure is None with a reason, never 0, which is an honest score.
"""

import re
from dataclasses import dataclass

NO_SCORE = "no score"
OUT_OF_RANGE = "score out of range"
OTHER_SCALE = "score on another scale"
RANGE = "a range instead of a score"
"""Reasons by which failures are counted."""

_MARK = r"[\s\"'*_`]*"
_COLON = rf"{_MARK}(?:\([^)\n]*\))?{_MARK}[:：=]"
_NUMBER = r"[+\-−–]?\s?(?:\d+(?:[.,]\d+)?|[.,]\d+)"
_SCORE = re.compile(
    rf"\bscore{_COLON}[\s\"'*_`\[(<]*(?P<number>{_NUMBER})"
    r"(?P<scale>\s?%|\s?/\s?\d+(?:\.\d+)?|\s+out of\s+\d+)?(?P<range>[-–]\.?\d|\s+to\s+[+\-−–]?\.?\d)?",
    re.IGNORECASE,
)
_REGION = re.compile(rf"^[\s*#>\-{{\"'\[(|]*region(?:\s*id)?{_MARK}[:：=#]?{_MARK}(\d+)", re.IGNORECASE | re.MULTILINE)
_OBJECT = re.compile(rf"\bobject{_COLON}(?P<text>[^\n]*)", re.IGNORECASE)
_IMPRESSION = re.compile(rf"\bimpression{_COLON}(?P<text>[^\n]*)", re.IGNORECASE)
_REASON = re.compile(rf"\b(?:reason|justification){_COLON}(?P<text>[^\n]*)", re.IGNORECASE)
_UNITS = re.compile(r"/\s?1(?:\.0*)?$")


@dataclass(frozen=True)
class Answer:
    """Score of one thing in an answer. `score` is None exactly if `failure` names the reason."""

    score: float | None
    failure: str | None = None
    name: str = ""
    """The object that the judge saw, or its impression of the whole picture."""
    reason: str = ""


def without_thought(text: str) -> str:
    """The answer after the last thought; empty if a thought was begun and not finished."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def read_score(text: str) -> tuple[float | None, str | None]:
    """(first score in a text, None), or (None, why there is none)."""
    found = _SCORE.search(text)
    if found is None:
        return None, NO_SCORE
    if found["range"]:
        return None, RANGE
    if found["scale"] and not _UNITS.match(found["scale"].strip()):
        return None, OTHER_SCALE
    number = found["number"].replace(" ", "").replace("−", "-").replace("–", "-").replace(",", ".")
    score = float(number)
    return (score, None) if -1 <= score <= 1 else (None, OUT_OF_RANGE)


def read_answer(text: str) -> Answer:
    """The layout's or the whole picture's score, with its reason and impression."""
    text = without_thought(text)
    score, failure = read_score(text)
    reason = _field(_REASON, text)
    # Some judges give the reason on the line of the score and leave out the word.
    if not reason and (found := _SCORE.search(text)):
        reason = _clean(text[found.end() :].partition("\n")[0].lstrip(")]"))
    return Answer(score, failure, _field(_IMPRESSION, text), reason)


def read_regions(text: str) -> dict[int, Answer]:
    """Answers by region number. Of several blocks for one number the last with a score counts."""
    text = without_thought(text)
    heads = list(_REGION.finditer(text))
    found: dict[int, Answer] = {}
    ends = [*(head.start() for head in heads[1:]), len(text)]
    for head, end in zip(heads, ends, strict=False):
        block = text[head.end() : end]
        score, failure = read_score(block)
        answer = Answer(score, failure, _field(_OBJECT, block), _field(_REASON, block))
        if score is not None or int(head[1]) not in found:
            found[int(head[1])] = answer
    return found


def _field(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return _clean(found["text"]) if found else ""


def _clean(text: str) -> str:
    return text.strip().strip("*_`\"'[]{},").strip()
