"""Data set `scenes`: texts say what the pictures show, edits keep the rest, held-out combinations stay out.

Pictures are read by the checker's eyes (`shapes_vision.py`, tested in tests/evaluation), texts by the rules here.
"""

import io
import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megabagel.config.load import load
from megabagel.config.schema import DataConfig
from megabagel.data.builders import toy_shapes
from megabagel.data.builders.scenes import THINK_TO_ANSWER, THINK_TO_DRAW, random_scene, write_scenes
from megabagel.data.builders.scenes_edits import THINGS, conceptual, simple_edit, two_step
from megabagel.data.builders.scenes_page import COLOURS, PAPER, PLACES, SHAPES, Figure, Scene, render
from megabagel.data.builders.scenes_text import NUMBERS, TAGS, all_prompts, held_out, mention, prompts
from megabagel.data.documents import ImageItem, Task, TextItem
from megabagel.data.index.index import Index, build_index, find_shards
from megabagel.data.plan.global_plan import open_sources
from megabagel.data.stats import count_steps
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from megabagel.evaluation.shapes_vision import find_figures
from megabagel.sequence.keys import generator

SAMPLES = 96
PER_KIND = {"draw": SAMPLES, "ask": SAMPLES // 2, "edits": SAMPLES, "concepts": SAMPLES // 8, "think": SAMPLES // 8}

Seen = dict[str, tuple[str, str]]
"""Place -> colour and shape."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(folder, samples=SAMPLES, size=64, seed=3)
    return folder


def index(root: Path, kind: str, task: Task) -> Index:
    found = build_index(find_shards(root, f"{kind}-*.tar"), load_tokenizer(str(root)), task, cache=root / "cache")
    assert not found.skipped and len(found.documents) == PER_KIND[kind]
    return found


def pixels(index: Index, item: ImageItem) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(index.read(item.member))).convert("RGB"))


def seen(picture: np.ndarray) -> Seen:
    return {str(figure.place): (str(figure.colour), str(figure.shape)) for figure in find_figures(picture)}


def named(text: str) -> list[tuple[str | None, str, str | None]]:
    """Colour, shape and place of every figure that a caption names."""
    pattern = rf"a (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})(?: at the ({'|'.join(PLACES)}))?"
    return [(colour or None, shape, place or None) for colour, shape, place in re.findall(pattern, text)]


def says(text: str, scene: Seen) -> bool:
    """Whether a caption describes all of the page, worked out from its words."""
    if match := re.fullmatch(r"(two|three|four) (\w+) (\w+)s", text):
        return list(scene.values()) == [match.groups()[1:]] * NUMBERS.index(match[1])
    figures = named(text)
    for relation, axis, sign in (("left of", 1, 1), ("right of", 1, -1), ("above", 0, 1), ("below", 0, -1)):
        if relation in text:
            order = [place.split()[axis] in ("top", "left") for kind in figures for place in places(scene, kind)]
            return len(scene) == 2 and order == ([True, False] if sign == 1 else [False, True])
    left = list(scene.items())
    for colour, shape, place in figures:
        fits = [(p, k) for p, k in left if k[1] == shape and colour in (None, k[0]) and place in (None, p)]
        if not fits:
            return False
        left.remove(fits[0])
    return not left


def places(scene: Seen, kind: tuple[str | None, str, str | None]) -> list[str]:
    return [place for place, (colour, shape) in scene.items() if (colour, shape) == kind[:2]]


def test_captions_say_what_the_pictures_show(root: Path) -> None:
    draw = index(root, "draw", "t2i")
    counts: Counter[int] = Counter()
    tags: Counter[str] = Counter()
    for document in draw.documents:
        scene = seen(pixels(draw, document.images[0]))
        counts[len(scene)] += 1
        captions = [draw.text(text) for text in document.texts]
        tags.update(
            "related" if re.search("of a|above|below", c) else "counted" if c[:2] != "a " else "" for c in captions
        )
        assert all(says(caption, scene) for caption in captions), (captions, scene)
        other = dict(list(scene.items())[1:])
        assert not any(says(caption, other) for caption in captions)
    assert set(counts) == {1, 2, 3, 4} and tags["related"] and tags["counted"]


def test_answers_are_right(root: Path) -> None:
    ask = index(root, "ask", "i2t")
    kinds: Counter[str] = Counter()
    for document in ask.documents:
        scene = seen(pixels(ask, document.images[0]))
        texts = [ask.text(text) for text in document.texts]
        assert [text.role for text in document.texts] == ["condition", "target"] * (len(texts) // 2)
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            kinds[answer_of(question, scene, answer)] += 1
    assert kinds.keys() == {"what", "colour", "where", "how many", "yes", "no", "describe"}
    assert 0.5 < kinds["yes"] / kinds["no"] < 2


def answer_of(question: str, scene: Seen, answer: str) -> str:
    """The kind of a question whose answer is right."""
    kinds = list(scene.values())
    if match := re.fullmatch("what is at the (.*)\\?", question):
        assert answer == (f"a {' '.join(scene[match[1]])}" if match[1] in scene else "nothing")
        return "what"
    if match := re.fullmatch("which colour is the (.*)\\?", question):
        assert [answer] == [colour for colour, shape in kinds if shape == match[1]]
        return "colour"
    if match := re.fullmatch("where is the (.*)\\?", question):
        assert [answer] == [f"at the {place}" for place, kind in scene.items() if " ".join(kind) == match[1]]
        return "where"
    if match := re.fullmatch("how many (.*)s are there\\?", question):
        assert answer == NUMBERS[sum(match[1] in ("figure", shape) for _, shape in kinds)]
        return "how many"
    if question == "what do you see?":
        assert {place: (colour, shape) for colour, shape, place in named(answer)} == scene
        return "describe"
    match = re.fullmatch("is there a (.*)\\?", question)
    assert match and answer == ("yes" if match[1] in map(" ".join, kinds) else "no")
    return answer


@pytest.mark.parametrize("kind", ["edits", "concepts"])
def test_edits_keep_the_rest_bit_for_bit(root: Path, kind: str) -> None:
    edits = index(root, kind, "edit")
    lengths: Counter[int] = Counter()
    for document in edits.documents:
        pages = [pixels(edits, image) for image in document.images]
        lengths[len(pages)] += 1
        for before, after in pairwise(pages):
            changed = quarters(before != after)
            was, became = seen(before), seen(after)
            assert changed and changed == {place for place in PLACES if was.get(place) != became.get(place)}
    assert set(lengths) == ({2, 3} if kind == "edits" else {2})


def quarters(differs: np.ndarray) -> set[str]:
    """Places in whose quarter of the page any pixel differs."""
    half = differs.shape[0] // 2
    parts = {"top": slice(half), "bottom": slice(half, None), "left": slice(half), "right": slice(half, None)}
    return {place for place in PLACES if differs[tuple(parts[word] for word in place.split())].any()}


RED, BLUE, GREEN = (
    Figure("red", "circle", "top left"),
    Figure("blue", "square", "top right"),
    Figure("green", "circle", "bottom left"),
)


def test_instructions_say_what_becomes_of_the_page() -> None:
    """Every kind of edit of one page, against the meaning of its words."""
    scene = Scene.of([RED, BLUE, GREEN])
    kinds: Counter[str] = Counter()
    for number in range(300):
        edit = simple_edit(scene, generator("edit", number))
        kinds[edit.kind] += 1
        before, after = as_seen(edit.before), as_seen(edit.after)
        words, expected = edit.instruction, dict(before)
        if edit.kind == "add":
            colour, shape = words.split()[2:4]
            expected[words.split("at the ")[1]] = colour, shape
        else:
            subject = re.sub("^(move|make|turn|remove) the ", "", words)
            (place,) = [place for place, kind in before.items() if subject.startswith(names_of(place, kind))]
            colour, shape = expected.pop(place)
            last = words.split()[-1]
            if edit.kind == "recolour":
                expected[place] = last, shape
            elif edit.kind == "reshape":
                expected[place] = colour, last
            elif edit.kind == "move":
                expected[words.split(" to the ")[1]] = colour, shape
        assert after == expected, (words, before, after)
    assert kinds.keys() == {"recolour", "reshape", "move", "remove", "add"} and min(kinds.values()) > 30


def names_of(place: str, kind: tuple[str, str]) -> tuple[str, ...]:
    return kind[1], " ".join(kind), f"figure at the {place}"


def as_seen(scene: Scene) -> Seen:
    return {figure.place: figure.kind for figure in scene.figures}


def test_thoughts_resolve_conceptual_edits() -> None:
    scene = Scene.of([RED, BLUE, GREEN])
    for number in range(100):
        edit = conceptual(scene, generator("concept", number))
        assert edit.before != edit.after and edit.after.figures and edit.thought
        after = as_seen(edit.after)
        if "remove every figure without corners" in edit.instruction:
            assert after == {"top right": ("blue", "square")} and "circles" in edit.thought
        if match := re.search("the colour of (.*)", edit.instruction):
            colour = {thing: colour for colour, thing in THINGS.items()}.get(match[1])
            meant = colour or as_seen(scene)[match[1].removeprefix("the figure at the ")][0]
            assert edit.thought.endswith(meant) and {after[place][0] for place in edit.places} == {meant}


def test_two_steps_change_what_both_say() -> None:
    for number in range(50):
        edit = two_step(Scene.of([RED, BLUE]), generator("two", number))
        assert edit.instruction.count(", then ") == 1 and len(edit.places) >= 2


def test_thoughts_are_learned_after_the_system_prompt(root: Path) -> None:
    think = index(root, "think", "interleave")
    orders: Counter[tuple[str, ...]] = Counter()
    for document in think.documents:
        roles = tuple("image " * isinstance(item, ImageItem) + str(item.role) for item in document.items)
        orders[roles] += 1
        texts = [think.text(item) for item in document.items if isinstance(item, TextItem)]
        assert texts[0] == (THINK_TO_ANSWER if "image look" in roles else THINK_TO_DRAW)
        assert re.match("<think>.+</think>", texts[-1]) and document.texts[-1].role == "target"
    assert orders.keys() == {
        ("condition", "condition", "target", "image target"),
        ("condition", "image condition", "condition", "target", "image target"),
        ("condition", "image look", "condition", "target"),
    }


def test_held_out_combinations_stay_out(root: Path) -> None:
    """No caption of the data set is held out, by its text; every tag has prompts on both sides."""
    forbidden = {prompt.text for tag in TAGS for prompt in all_prompts(tag) if prompt.held_out}
    written = " ".join(path.read_bytes().decode(errors="ignore") for path in sorted(root.glob("draw-*.tar")))
    captions = set(re.findall(r'\\"\w+_\d\\": \\"([^\\]*)\\"', written))
    assert len(captions) > SAMPLES and not captions & forbidden
    for tag in TAGS:
        sides = Counter(prompt.held_out for prompt in all_prompts(tag))
        assert sides[True] >= 3 and sides[True] <= sides[False] / 2, (tag, sides)
    words = {word for text in forbidden for word in text.split()}
    assert words <= {word for text in captions for word in text.split()}


def test_held_out_is_one_answer_per_combination() -> None:
    """Wordings of one thing agree; places, sizes and offsets have no say where the prompt does not name them."""
    pairs = {prompt.text: prompt.held_out for prompt in all_prompts("position")}
    assert all(pairs[other_wording(text)] == out for text, out in pairs.items())
    attributes = {prompt.text: prompt.held_out for prompt in all_prompts("color_attr")}
    assert all(attributes[" and ".join(reversed(text.split(" and ")))] == out for text, out in attributes.items())
    scene = Scene.of([RED, BLUE])
    moved = Scene.of([Figure(*RED.kind, RED.place, 0.02, -0.01, 0.18), BLUE])
    assert held_out(scene) == held_out(moved) and prompts(scene) == prompts(moved)


def other_wording(text: str) -> str:
    for one, other in (("left of", "right of"), ("above", "below")):
        for here, there in ((one, other), (other, one)):
            if f" {here} " in text:
                first, second = text.split(f" {here} ")
                return f"{second} {there} {first}"
    raise AssertionError(text)


def test_the_rule_of_held_out_prompts_does_not_change() -> None:
    """Trained checkpoints have not seen these: another rule would test them on what they were trained on."""
    assert [p.text for p in all_prompts("colors") if p.held_out] == [
        "a green circle", "a yellow circle", "a yellow square", "a purple triangle",
    ]  # fmt: skip
    assert [p.text for p in all_prompts("single_object") if p.held_out] == [
        "a circle at the top right", "a square at the top right", "a square at the bottom right",
    ]  # fmt: skip


def test_mentions_single_out_a_figure() -> None:
    twin = Figure("red", "circle", "bottom right")
    assert {mention(Scene.of([RED, twin, GREEN]), RED, generator("m", n)) for n in range(9)} == {
        "the figure at the top left"
    }
    assert {mention(Scene.of([RED, GREEN]), RED, generator("m", n)) for n in range(9)} == {"the red circle"}
    assert {mention(Scene.of([RED, BLUE]), RED, generator("m", n)) for n in range(9)} == {
        "the red circle",
        "the circle",
    }


def test_palettes_are_exact() -> None:
    page = np.asarray(render(Scene.of([RED, BLUE]), 64))
    assert (
        tuple(page[16, 16]) == COLOURS["red"]
        and tuple(page[16, 48]) == COLOURS["blue"]
        and tuple(page[48, 48]) == PAPER
    )


def test_a_scene_survives_json() -> None:
    scene = random_scene(generator("json"))
    assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


def test_the_seed_decides_every_byte(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "same", samples=SAMPLES, size=64, seed=3)
    write_scenes(tmp_path / "other", samples=8, size=64, seed=4)
    for path in (tmp_path / "same").iterdir():
        assert path.read_bytes() == (root / path.name).read_bytes()
    assert (tmp_path / "other" / "draw-000000.tar").read_bytes()[:4096] != (root / "draw-000000.tar").read_bytes()[
        :4096
    ]
    with pytest.raises(UserError, match=r"scenes\.json: the scene data set there has .*expected .*'seed': 9\}"):
        write_scenes(root, samples=SAMPLES, size=64, seed=9)


def test_the_config_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(toy_shapes, "write_scenes", lambda root, **kwargs: calls.append((root, kwargs)))
    toy_shapes.ensure_dataset(DataConfig(root=str(tmp_path), builder="scenes"))
    assert calls == [(tmp_path, {"samples": 5000, "size": 64, "seed": 0})]


def test_the_shipped_config_fits_the_data_set(root: Path) -> None:
    overrides = [f"data.root={root}", f"data.tokenizer={root / 'tokenizer.json'}", "data.builder=none"]
    config = load(Path(__file__).parents[2] / "examples" / "configs" / "scenes.yaml", overrides)
    sources = count_steps(config, open_sources(config, load_tokenizer(config.data.tokenizer)), 3).sources
    assert sources.keys() == {"draw", "ask", "edit", "concept", "think"}
    assert all(source.samples and not source.skipped and not source.left_out for source in sources.values())
