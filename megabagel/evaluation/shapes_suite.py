"""Suite `shapes`: held-out prompts to draw, edits to make and questions to answer, as a pure function of a seed.

An item is JSON: `id`, `ability` (draw, edit, ask), `tag` (what it tests) and `prompt`, and what the check needs:
`include` of a prompt in GenEval's fields; scenes `before` and `after` of an edit; `scene`, `answer` and `pair` of a
question. Every item is held out (`megabagel/data/builders/scenes_text.py`): its prompt, or the page it begins with.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np

from megabagel.data.builders.scenes import random_scene
from megabagel.data.builders.scenes_edits import Edit, add, conceptual, move, recolour, remove, reshape, two_step
from megabagel.data.builders.scenes_page import COLOURS, PLACES, Scene, pick, random_figure, render
from megabagel.data.builders.scenes_text import TAGS, Prompt, all_prompts, held_out, prompts, questions
from megabagel.evaluation.shapes_checker import answer_matches, judge_edit, judge_picture
from megabagel.sequence.keys import generator

Item = dict[str, Any]
"""JSON values."""

EDITS: dict[str, Callable[[Scene, np.random.Generator], Edit]] = {
    "recolour": recolour,
    "reshape": reshape,
    "move": move,
    "remove": remove,
    "add": add,
    "two_step": two_step,
    "conceptual": conceptual,
}
QUESTIONS = ("what", "colour", "where", "how many")


def shapes_suite(seed: int, count: int) -> list[Item]:
    """`count` items of each ability, tags in turn. Questions: the last third are yes/no, in pairs about one page."""
    items: list[Item] = []
    for ability, make in (("draw", _draw_items), ("edit", _edit_items), ("ask", _ask_items)):
        items += [{"id": f"{ability}-{n:05d}", "ability": ability, **item} for n, item in enumerate(make(seed, count))]
    return items


def _draw_items(seed: int, count: int) -> Iterable[Item]:
    """Held-out prompts of the six tags, each list shuffled and repeated where it is short."""
    streams = []
    for tag in TAGS:
        kept = [prompt for prompt in all_prompts(tag) if prompt.held_out]
        streams.append(cycle([kept[i] for i in generator(seed, "suite", tag).permutation(len(kept))]))
    return (next(stream).to_json() for stream in islice(cycle(streams), count))


def _edit_items(seed: int, count: int) -> Iterable[Item]:
    """Edits of held-out pages with two or three figures, so that there is something to keep."""
    for number, (kind, make) in enumerate(islice(cycle(EDITS.items()), count)):
        rng = generator(seed, "suite", "edit", number)
        scene = random_scene(rng, lambda scene: held_out(scene) and len(scene.figures) in (2, 3))
        edit = make(scene, rng)
        scenes = {"before": edit.before.to_json(), "after": edit.after.to_json()}
        yield {"tag": kind, "prompt": edit.instruction, **scenes}


def _ask_items(seed: int, count: int) -> Iterable[Item]:
    pairs = count // 6
    for number in range(count - 2 * pairs):
        yield _asked(seed, number, QUESTIONS[number % len(QUESTIONS)], None)[0]
    for pair in range(pairs):
        yield from _asked(seed, count + pair, "yes/no", pair)


def _asked(seed: int, number: int, kind: str, pair: int | None) -> list[Item]:
    """The questions of a kind about the first held-out page of this number that has any."""
    rng = generator(seed, "suite", "ask", number)
    while True:
        scene = random_scene(rng, held_out)
        found = [question for question in questions(scene, rng) if question.kind == kind]
        if found:
            shown = {"scene": scene.to_json(), "pair": pair}
            return [{"tag": kind, "prompt": q.text, "answer": q.answer, **shown} for q in found]


def page_of(item: Item, size: int) -> np.ndarray | None:
    """The page that an edit begins with or a question is about, RGB uint8; None for prompts to draw."""
    scene = item.get("before") or item.get("scene")
    return np.asarray(render(Scene.from_json(scene), size)) if scene else None


def check(item: Item, output: np.ndarray | str) -> dict[str, Any]:
    """Score a model's output for an item: a picture (draw, edit) or a reply (ask).

    Returns:
        `correct`, and beside it `faults` of pictures, `made` and `kept` of edits.
    """
    if item["ability"] == "ask":
        assert isinstance(output, str)
        return {"correct": answer_matches(item["answer"], output)}
    assert isinstance(output, np.ndarray)
    if item["ability"] == "draw":
        judgement = judge_picture(Prompt.from_json(item), output)
        return {"correct": judgement.correct, "faults": list(judgement.faults)}
    edit = Edit(item["tag"], item["prompt"], Scene.from_json(item["before"]), Scene.from_json(item["after"]))
    before = page_of(item, output.shape[0])
    assert before is not None
    verdict = judge_edit(edit, before, output)
    return {"correct": verdict.correct, "made": verdict.made, "kept": verdict.kept, "faults": list(verdict.faults)}


def yes_no_scores(results: Sequence[tuple[int, bool]]) -> tuple[float, float]:
    """MME's acc (share of right answers) and acc+ (share of pairs with both right) of (pair, correct) results."""
    pairs: dict[int, list[bool]] = {}
    for pair, correct in results:
        pairs.setdefault(pair, []).append(correct)
    return sum(correct for _, correct in results) / len(results), sum(map(all, pairs.values())) / len(pairs)


# The checker's own error


def truth(item: Item, size: int, rng: np.random.Generator) -> np.ndarray | str:
    """A right output: a rendered page or the answer."""
    if item["ability"] == "ask":
        return str(item["answer"])
    scene = scene_of(Prompt.from_json(item), rng) if item["ability"] == "draw" else Scene.from_json(item["after"])
    return np.asarray(render(scene, size))


def wrong(item: Item, size: int, rng: np.random.Generator) -> np.ndarray | str:
    """An output that is wrong in one thing: an attribute that the prompt names, a figure too many, ..."""
    if item["ability"] == "ask":
        answers = {"yes": ("no",), "no": ("yes",)}.get(item["answer"], ("red", "zero", "nothing", "black"))
        return pick(rng, answers, but=item["answer"])
    if item["ability"] == "draw":
        return np.asarray(render(_spoilt(Prompt.from_json(item), rng), size))
    before, after = Scene.from_json(item["before"]), Scene.from_json(item["after"])
    kept = [figure for figure in after.figures if figure in before.figures]
    if kept and rng.random() < 0.5:  # the edit made, and something else with it
        spoilt = replace(figure := pick(rng, kept), colour=pick(rng, COLOURS, but=figure.colour))
        return np.asarray(render(after.without(figure).having(spoilt), size))
    return np.asarray(render(before, size))


def scene_of(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that the prompt describes; what it leaves open is random."""
    wanted = [requirement for requirement in prompt.include for _ in range(requirement.count)]
    while True:
        places = [list(PLACES)[i] for i in rng.permutation(len(PLACES))]
        figures = []
        for requirement, place in zip(wanted, places, strict=False):
            figure = random_figure(rng, (requirement.place or place,))
            figures.append(replace(figure, shape=requirement.shape, colour=requirement.colour or figure.colour))
        if len({figure.place for figure in figures}) == len(figures):
            scene = Scene.of(figures)
            if prompt in prompts(scene):
                return scene


def _spoilt(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene that the prompt does not describe: each of these changes alters something that the prompt names."""
    scene = scene_of(prompt, rng)
    changes = [reshape]
    if prompt.include[0].colour:
        changes.append(recolour)
    if prompt.include[0].place:
        changes.append(move)
    if scene.free:
        changes.append(add)
    if len(scene.figures) > 1:
        changes.append(remove)
    if prompt.include[0].position:
        changes.append(_exchanged)
    return pick(rng, changes)(scene, rng).after


def _exchanged(scene: Scene, rng: np.random.Generator) -> Edit:
    first, second = scene.figures
    swapped = Scene.of([replace(first, place=second.place), replace(second, place=first.place)])
    return Edit("exchange", "", scene, swapped)


def self_test(seed: int = 0, count: int = 60, size: int = 64) -> dict[str, float]:
    """Share of outputs found correct. Before the checker may judge a model, `truths` is 1 and `wrong` at most 0.02."""
    shares = {}
    for name, make in (("truths", truth), ("wrong", wrong)):
        items = shapes_suite(seed, count)
        outputs = [make(item, size, generator(seed, "self-test", name, item["id"])) for item in items]
        shares[name] = sum(check(item, output)["correct"] for item, output in zip(items, outputs, strict=True)) / len(
            items
        )
    return shares
