"""`srum_*` cases without a model: reward maps, their pooling, texts of the judge, activation clusters."""

from typing import Any

import numpy as np
import torch

from megabagel.config.schema import RewardConfig
from megabagel.parity.case import Case
from megabagel.parity.comparisons import Gates, Row, compare
from megabagel.posttrain.activation import clusters, strength
from megabagel.posttrain.judge_text import Answer, read_answer, read_regions
from megabagel.rewards.records import as_released, to_released
from megabagel.rewards.regions import Reward
from megabagel.rewards.weights import global_factor, pooled, reward_map

Found = tuple[list[Row], list[str]]
"""Rows and notes."""


def is_pure(case: Case) -> bool:
    """Whether the case has no model."""
    return "config" not in case.about and "steps" not in case.about


def compare_pure(case: Case, gates: Gates) -> Found:
    """Compare a case by what its JSON describes."""
    about = case.about
    if "maps" in about:
        return _maps(case, gates)
    if "records" in about:
        return _texts(case, gates)
    if "clusters" in about:
        return _activation(case, gates), []
    rules = RewardConfig()
    rows = []
    for name in about["cases"]:
        entries = case.tensors(name)
        grid = tuple(about["cases"][name]["tokens"])
        ours = torch.from_numpy(pooled(entries["map"].numpy(), (grid[0], grid[1]), rules.pooling)).flatten()
        rows.append(compare(f"{name}/tokens", ours, entries["tokens"], gates.block))
    return rows, []


def _maps(case: Case, gates: Gates) -> Found:
    """Maps by rule `code`; what the released loader makes of a record decides which boxes it has."""
    rules, rows = RewardConfig(rule="code"), []
    for name, about in case.entry("maps").items():
        reward = as_released(about["vlm_rewards"])
        map_hw = global_factor(reward, rules) * reward_map(reward, (about["height"], about["width"]), rules)
        rows.append(compare(f"{name}/map", torch.from_numpy(map_hw), case.tensors(name)["map"], gates.block))
    for name in case.about.get("raises_and_the_record_is_lost", ()):
        score = None if "null" in name else "0.9"
        rows.append(compare(name, float(_raises(score)), 1.0, gates.exact))
    return rows, []


def _raises(score: object) -> bool:
    try:
        as_released([{"object": "thing", "bbox": [0, 0, 4, 4], "score": score}])
    except TypeError:
        return True
    return False


def _texts(case: Case, gates: Gates) -> Found:
    """The judge's texts: equal where the released parser reads a score; a note where ours reads more or refuses."""
    rows: list[Row] = []
    notes: list[str] = []
    for name, about in case.entry("regions").items():
        ours, theirs = read_regions(about["text"]), about["parsed"]
        for number in sorted({*ours, *map(int, theirs)}):
            found = theirs.get(str(number), {})
            _text_row(rows, notes, f"regions/{name}[{number}]", ours.get(number), found, "score", gates)
    for group, score in (("global", "global_layout_score"), ("whole_image", "score")):
        for name, about in case.entry(group).items():
            answer = read_answer(about["text"])
            _text_row(rows, notes, f"{group}/{name}", answer, about["parsed"], score, gates)
    for name, about in case.entry("records").items():
        _record_row(rows, notes, name, about, gates)
    return rows, notes


def _text_row(
    rows: list[Row], notes: list[str], name: str, ours: Answer | None, theirs: dict[str, Any], key: str, gates: Gates
) -> None:
    """Compare one score; scores outside of [-1, 1], which the released parser takes, are to be refused."""
    theirs_score, score = theirs.get(key), ours.score if ours else None
    if theirs_score is None and score is not None:
        notes.append(f"{name}: ours reads {score:g}, the released parser loses it")
        return
    if theirs_score is not None and not -1 <= theirs_score <= 1:
        failure = ours.failure if ours else None
        notes.append(f"{name}: ours refuses it ({failure}), the released parser takes {theirs_score:g}")
        theirs_score = None
    missing = -9.0  # stands for "no score" on both sides
    rows.append(
        compare(f"{name}.score", missing if score is None else score, missing if theirs_score is None else theirs_score,
                gates.exact)
    )  # fmt: skip
    for field in ("identified_object",):
        if field in theirs:
            same = ours is not None and ours.name == theirs[field]
            rows.append(compare(f"{name}.{field}", float(same), 1.0, gates.exact))


def _record_row(rows: list[Row], notes: list[str], name: str, about: dict[str, Any], gates: Gates) -> None:
    """The training record of a judged one: prompt and scores as released, except that an honest 0 is kept."""
    record, prompt = about["record"], about["prompt_map"].get(about["record"]["image_file"])
    theirs = about["training_record"]
    ours = None
    if prompt is not None:
        reward = _judged(record)
        ours = (
            to_released(reward, record["image_file"], prompt) if reward.regions or reward.layout is not None else None
        )
    if ours is not None and theirs is None:
        notes.append(f"records/{name}: ours keeps it, the released step drops a layout score of 0")
        return
    rows.append(compare(f"records/{name}", float(_scores(ours) == _scores(theirs)), 1.0, gates.exact))


def _judged(record: dict[str, Any]) -> Reward:
    """A released record before its format step, as our reward."""
    entries = [{**entry, "object": entry["identified_object"]}
               for entry in record["vlm_rewards"] if "identified_object" in entry and "bbox" in entry]  # fmt: skip
    layout = record["global_layout_reward"]
    reward = as_released(entries)
    names = [entry["object"] for entry in entries]
    regions = tuple(type(r)(r.box, r.score, name) for r, name in zip(reward.regions, names, strict=True))
    whole = (layout or {}).get("bbox")
    size = (whole[2], whole[3]) if whole else None
    return Reward(regions, layout and layout["global_layout_score"], size=size)


def _scores(record: dict[str, Any] | None) -> Any:
    """A training record without the judge's reasons, which training does not read."""
    if record is None:
        return None
    entries = [{name: value for name, value in entry.items() if name != "reason"} for entry in record["vlm_rewards"]]
    return {**record, "vlm_rewards": entries}


def _activation(case: Case, gates: Gates) -> list[Row]:
    base = {kind: case.tensors("base")[kind].numpy() for kind in ("und", "gen")}
    found = clusters(base["und"].mean(0), base["gen"].mean(0), case.entry("percentile"))
    rows = [compare("threshold", found.threshold, case.entry("threshold"), gates.block)]
    for name in ("und", "gen"):
        ours = torch.as_tensor(np.asarray(getattr(found, name)))
        rows.append(compare(f"clusters/{name}", ours, torch.tensor(case.entry("clusters")[name]), gates.exact))
    for name, expected in case.entry("strength").items():
        model, task, cluster = name.split("/")
        values = case.tensors(model)[task.removesuffix("_task")].numpy()
        ours_strength = strength(values, getattr(found, cluster.removesuffix("_cluster")))
        rows.append(compare(f"strength/{name}", ours_strength, expected, gates.block))
    return rows
