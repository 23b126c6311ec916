"""Stages `judge` and `format`: scores of every picture, and the training records made of them.

WORK/judged.jsonl     image_file, prompt, size, judge, regions, layout, overall, failures, attempts, raw
WORK/train.jsonl      records as released, for a source of task `reward` with `images: WORK/images`
"""

import json
import logging
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megabagel.errors import UserError
from megabagel.journal import write_whole
from megabagel.locks import inside, locked
from megabagel.posttrain.boxes import BOXES, drawn_pictures, open_picture
from megabagel.posttrain.journal import Journal, Record, append_to, read_records
from megabagel.posttrain.judges import JudgeOptions, judge_of
from megabagel.posttrain.ranks import first_rank
from megabagel.rewards.records import to_released
from megabagel.rewards.regions import Region, Reward
from megabagel.runtime.collective_errors import from_rank0

# Stages without a model start without megatron-core, whose import takes seconds.
if TYPE_CHECKING:
    from megabagel.inference.api import Pipeline

logger = logging.getLogger(__name__)

JUDGED, TRAIN = "judged.jsonl", "train.jsonl"


def judge(work: Path, options: JudgeOptions, model: "Pipeline | None" = None) -> dict[str, int]:
    """Judge all drawn pictures that `work` has no scores of; returns counts. Called on all ranks.

    Args:
        work: folder of the pipeline.
        options: settings of the stage.
        model: the judge, for `scenes` and `model`.

    Raises:
        UserError: the folder is in use, boxes are missing for judge `model`, or nothing can be written.
    """
    if not first_rank():
        return _judge(work, options, model)
    with locked(inside(work), str(work)):
        return _judge(work, options, model)


def _judge(work: Path, options: JudgeOptions, model: "Pipeline | None") -> dict[str, int]:
    settings = {**asdict(options), "weights": model.source.digest if model and options.by != "exact" else None}
    journals: list[Journal] = []

    def begin() -> list[tuple[Record, list[Any]]]:
        journals.append(Journal(work / JUDGED, "image_file", settings))
        boxes = {one["image_file"]: one["boxes"] for one in read_records(work / BOXES, "image_file")}
        left = [one for one in drawn_pictures(work) if one["image_file"] not in journals[0]]
        if options.by == "model" and (absent := [one for one in left if one["image_file"] not in boxes]):
            raise UserError(
                f"{work / BOXES}: has no boxes of {len(absent)} pictures, first {absent[0]['image_file']}; run "
                "`megabagel posttrain boxes` first"
            )
        return [(one, boxes.get(one["image_file"], [])) for one in left]

    scored, left = judge_of(options, model), from_rank0(begin)
    failures: Counter[str] = Counter()
    for record, boxes in left:
        image, _ = open_picture(work, record["image_file"])
        scores = scored(image, record, [tuple(box) for box in boxes])
        failures.update(scores.failures.values())
        result = {"image_file": record["image_file"], "prompt": record["prompt"], "id": record["id"]}
        result |= {"size": list(image.size), "judge": options.by, **asdict(scores)}
        from_rank0(partial(append_to, journals, result))
    return {"pictures": len(left), "scores without a number": sum(failures.values()), **dict(failures.most_common())}


def format_records(work: Path, pairs: bool = False) -> dict[str, int]:
    """Write `train.jsonl` anew from all scores; returns counts.

    A region without a score is left out, and a picture without any score; an honest score of 0 stays.

    Args:
        work: folder of the pipeline.
        pairs: take the best candidate of each prompt as the good picture of the others, as second flow target.

    Raises:
        UserError: nothing is judged, or the file cannot be written.
    """
    judged = list(read_records(work / JUDGED, "image_file"))
    if not judged:
        raise UserError(f"{work / JUDGED}: no scores; run `megabagel posttrain judge` first")
    counts: Counter[str] = Counter()
    best = _best(judged) if pairs else {}
    lines = []
    for record in judged:
        reward = reward_of(record)
        counts["regions without a score"] += len(record["regions"]) - len(reward.regions)
        counts["layouts without a score"] += reward.layout is None
        if not reward.regions and reward.layout is None:
            counts["pictures left out: no score at all"] += 1
            continue
        good = best.get(record["id"])
        lines.append(json.dumps(to_released(reward, record["image_file"], record["prompt"], good), ensure_ascii=False))
        counts["pairs"] += good not in (None, record["image_file"])
    with locked(inside(work), str(work)):
        write_whole(work / TRAIN, "".join(f"{line}\n" for line in lines))
    return {"records": len(lines), **{name: count for name, count in counts.items() if count}}


def reward_of(record: Record) -> Reward:
    """The scores of a judged record, as training reads them."""
    regions = tuple(
        Region(tuple(one["box"]), float(one["score"]), one["name"])
        for one in record["regions"]
        if one["score"] is not None
    )
    return Reward(regions, record["layout"], record["overall"], tuple(record["size"]))


def _best(judged: list[Record]) -> dict[str, str]:
    """By prompt id the picture with the highest score of the whole, or mean of all scores."""

    def worth(record: Record) -> float:
        reward = reward_of(record)
        scores = [region.score for region in reward.regions] + ([] if reward.layout is None else [reward.layout])
        mean = sum(scores) / len(scores) if scores else -2.0
        return mean if reward.overall is None else reward.overall

    best: dict[str, Record] = {}
    for record in judged:
        if record["id"] not in best or worth(record) > worth(best[record["id"]]):
            best[record["id"]] = record
    return {prompt: record["image_file"] for prompt, record in best.items()}
