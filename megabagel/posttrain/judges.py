"""Judges: functions from a picture and its prompt to scores. A judge never makes up a score: a failure is None.

exact     rules of the drawn world; needs prompts of `scenes` (evaluation/shapes_checker.py)
scenes    the model itself on that world: it is asked what lies at each place, and its answers are judged by the
          rules, so that errors of its understanding reach the scores
model     the model itself, by SRUM's two-level prompts, with retries at a temperature
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from megabagel.data.builders.scenes_page import COLOURS, PLACES, SHAPES, Figure, Scene, render
from megabagel.data.builders.scenes_text import Prompt
from megabagel.errors import UserError
from megabagel.evaluation.shapes_checker import Judgement, judge_picture
from megabagel.posttrain.journal import Record
from megabagel.posttrain.judge_prompts import layout_prompt, overall_prompt, region_prompt
from megabagel.posttrain.judge_text import NO_SCORE, Answer, read_answer, read_regions
from megabagel.rewards.regions import Box
from megabagel.sequence.keys import seed64

# Stages without a model start without megatron-core, whose import takes seconds.
if TYPE_CHECKING:
    from megabagel.inference.api import Pipeline

RETRY_TEMPERATURE = 0.7


@dataclass
class Scores:
    """Scores of one picture; None where the judge failed."""

    regions: list[dict[str, Any]] = field(default_factory=list)
    """box, name, score, reason of each region."""
    layout: float | None = None
    overall: float | None = None
    failures: dict[str, str] = field(default_factory=dict)
    """Reason by what has no score: `layout`, `overall`, `regions[2]`."""
    attempts: int = 1
    raw: list[str] = field(default_factory=list)
    """Answers of the model, all attempts."""


Judge = Callable[[Image.Image, Record, Sequence[Box]], Scores]
"""(picture, record of the drawn picture, boxes) -> scores."""


@dataclass(frozen=True)
class JudgeOptions:
    """Which judge, and how the model is asked."""

    by: str = "exact"
    retries: int = 2
    """Further attempts for what has no score, at a temperature and with other seeds: the same greedy question again
    would give the same answer."""
    overall: bool = False
    """Ask for a score of the whole picture too."""
    think: bool = False
    max_new_tokens: int = 1024
    seed: int = 0


def judge_of(options: JudgeOptions, model: "Pipeline | None") -> Judge:
    """The judge that `options.by` names. Raises UserError for an unknown one, or one that lacks its model."""
    if options.by == "exact":
        return lambda image, record, boxes: exact(np.asarray(image), record)
    if options.by in ("scenes", "model"):
        if model is None:
            raise UserError(f"judge {options.by!r} asks the model; name a checkpoint")
        if options.by == "scenes":
            return lambda image, record, boxes: by_asking(model, image, record)
        return lambda image, record, boxes: by_prompts(model, image, record, boxes, options)
    raise UserError(f"judge {options.by!r}: expected exact, scenes or model")


def exact(picture: np.ndarray, record: Record) -> Scores:
    """Scores by the rules of the drawn world, which are never wrong about its pages."""
    return _scores(judge_picture(_scenes_prompt(record), picture))


def _scenes_prompt(record: Record) -> Prompt:
    item = record.get("item") or {}
    if "include" not in item or "tag" not in item:
        raise UserError(
            f"{record['image_file']}: the prompt names no requirements; this judge needs prompts of the drawn world "
            "(scenes:COUNT)"
        )
    return Prompt.from_json({**item, "prompt": record["prompt"]})


def _scores(judged: Judgement) -> Scores:
    regions: list[dict[str, Any]] = [
        {"box": [int(edge) for edge in r.box], "name": r.name, "score": float(r.score), "reason": r.reason}
        for r in judged.regions
    ]
    parts = [*(region["score"] for region in regions), judged.layout]
    overall = 1.0 if judged.correct else min(sum(parts) / len(parts), 0.0)
    return Scores(regions, float(judged.layout), float(overall))


def by_asking(model: "Pipeline", image: Image.Image, record: Record) -> Scores:
    """Scores of the page that the model says it sees: one question per place, in the words of its training."""
    prompt, figures, failures, raw = _scenes_prompt(record), [], {}, []
    for place in PLACES:
        answer = model.ask([image], f"what is at the {place}?", max_new_tokens=32)
        raw.append(answer)
        words = answer.lower().replace(".", " ").split()
        colour, shape = (next((w for w in words if w in names), None) for names in (COLOURS, SHAPES))
        if colour and shape:
            figures.append(Figure(colour, shape, place))
        elif "nothing" not in words:
            failures[place] = NO_SCORE
    side = image.width
    scores = _scores(judge_picture(prompt, np.asarray(render(Scene.of(figures), side))))
    # What the model could not name may be anything: its place gets no score, and the layout, which depends on it, none.
    if failures:
        unseen = [_quarter(place, image.size) for place in failures]
        scores.regions = [one for one in scores.regions if not any(_overlap(one["box"], box) for box in unseen)]
        scores.layout = scores.overall = None
    for region in scores.regions:
        region["box"] = _quarter_of(region["box"], image.size)
    scores.failures, scores.raw = failures, raw
    return scores


def _quarter(place: str, size: tuple[int, int]) -> list[int]:
    x, y = PLACES[place]
    width, height = size
    left, top = (width // 2 if x > 0.5 else 0), (height // 2 if y > 0.5 else 0)
    return [left, top, left + width // 2, top + height // 2]


def _quarter_of(box: Sequence[int], size: tuple[int, int]) -> list[int]:
    """The quarter of the page around a box's centre: the model knows places, not pixels."""
    right, low = box[0] + box[2] > size[0], box[1] + box[3] > size[1]
    return _quarter(f"{'bottom' if low else 'top'} {'right' if right else 'left'}", size)


def _overlap(a: Sequence[int], b: Sequence[int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def by_prompts(
    model: "Pipeline", image: Image.Image, record: Record, boxes: Sequence[Box], options: JudgeOptions
) -> Scores:
    """Local and global reward by SRUM's prompts, each asked again for what got no score.

    Args:
        model: the judge.
        image: the picture, with which the model sees no drawn boxes: regions are named by their numbers.
        record: of the drawn picture.
        boxes: its regions; none: no local reward.
        options: retries and decoding.
    """
    scores, prompt = Scores(), record["prompt"]

    def ask(question: str, turn: int) -> str:
        seed = seed64(options.seed, "judge", record["image_file"], turn) % 2**31
        decoding = {"temperature": RETRY_TEMPERATURE, "seed": seed} if turn else {}
        answer = model.ask([image], question, options.think, max_new_tokens=options.max_new_tokens, **decoding)
        scores.raw.append(answer)
        scores.attempts = max(scores.attempts, turn + 1)
        return answer

    found: dict[int, Answer] = {}
    for turn in range(options.retries + 1):
        missing = [n for n in range(1, len(boxes) + 1) if n not in found or found[n].score is None]
        if not missing:
            break
        answers = read_regions(ask(region_prompt(prompt, boxes), turn))
        found |= {n: answers[n] for n in missing if n in answers}
    for number, box in enumerate(boxes, 1):
        answer = found.get(number, Answer(None, NO_SCORE))
        scores.regions.append({"box": list(box), "name": answer.name, "score": answer.score, "reason": answer.reason})
        if answer.failure:
            scores.failures[f"regions[{number - 1}]"] = answer.failure
    scores.layout = _whole(ask, layout_prompt(prompt), "layout", scores, options.retries)
    if options.overall:
        scores.overall = _whole(ask, overall_prompt(prompt), "overall", scores, options.retries)
    return scores


def _whole(ask: Callable[[str, int], str], question: str, name: str, scores: Scores, retries: int) -> float | None:
    """One score of the whole picture, asked until it can be read."""
    failure = NO_SCORE
    for turn in range(retries + 1):
        answer = read_answer(ask(question, turn))
        if answer.score is not None:
            return answer.score
        failure = answer.failure or NO_SCORE
    scores.failures[name] = failure
    return None
