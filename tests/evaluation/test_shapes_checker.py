"""The exact checker on pages whose verdict is worked out by hand, and on disturbed pictures."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from megabagel.data.builders.scenes import random_scene
from megabagel.data.builders.scenes_edits import Edit
from megabagel.data.builders.scenes_page import COLOURS, PAPER, PLACES, Figure, Scene, render
from megabagel.data.builders.scenes_text import Prompt, Requirement
from megabagel.evaluation.shapes_checker import answer_matches, judge_edit, judge_picture
from megabagel.evaluation.shapes_vision import find_figures
from megabagel.model.vae_blocks import BlockCodec
from megabagel.sequence.keys import generator

RED = Figure("red", "circle", "top left")
BLUE = Figure("blue", "square", "bottom right")
GREEN = Figure("green", "triangle", "top right")


def page(*figures: Figure, size: int = 64) -> np.ndarray:
    return np.asarray(render(Scene.of(figures), size))


# Eyes


def through_codec(picture: np.ndarray) -> np.ndarray:
    codec = BlockCodec()
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    decoded = codec.decode(codec.encode(pixels))[0].clamp(-1, 1)
    return ((decoded + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def noisy(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    draws = generator("noise", int(sigma))
    return lambda picture: np.clip(picture + draws.normal(0, sigma, picture.shape), 0, 255).astype(np.uint8)


def blurred(radius: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda picture: np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))


DISTURBANCES = {
    "none": lambda picture: picture,
    "codec": through_codec,
    "codec and noise of 20 levels": lambda picture: noisy(20)(through_codec(picture)),
    "noise of 40 levels": noisy(40),
    "blur of 2 pixels": blurred(2),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_figures_are_found(name: str) -> None:
    for number in range(25):
        scene = random_scene(generator("eyes", number), lambda _: True)
        found = find_figures(DISTURBANCES[name](page(*scene.figures)))
        expected = [(*f.kind, f.place) for f in scene.figures]
        assert sorted(expected) == sorted((*f.kind, f.place) for f in found), (number, expected, list(map(str, found)))  # type: ignore[type-var]


@pytest.mark.parametrize("size", [48, 64, 100, 256, 1024])
def test_boxes_are_in_pixels_of_the_picture(size: int) -> None:
    for figure in find_figures(page(RED, BLUE, GREEN, size=size)):
        (truth,) = (f for f in (RED, BLUE, GREEN) if f.place == figure.place)
        assert np.abs(np.array(figure.box) - np.array(truth.box) * size).max() <= max(1.5, size / 64)


def test_an_empty_page_has_no_figures() -> None:
    assert find_figures(np.full((64, 64, 3), PAPER, np.uint8)) == []
    assert find_figures(noisy(20)(np.full((64, 64, 3), PAPER, np.uint8))) == []


def test_what_is_no_figure_gets_no_name() -> None:
    """A bar is no shape, grey-brown is no colour, the middle is no place, and touching figures are two."""
    bar = np.full((64, 64, 3), PAPER, np.uint8)
    bar[10:16, 4:60] = COLOURS["red"]
    assert [(f.colour, f.shape) for f in find_figures(bar)] == [("red", None)]
    middle = np.full((64, 64, 3), PAPER, np.uint8)
    middle[22:42, 22:42] = (120, 120, 20)
    assert [(f.kind, f.place) for f in find_figures(middle)] == [((None, "square"), None)]
    touching = np.full((64, 64, 3), PAPER, np.uint8)
    touching[6:26, 6:26], touching[6:26, 26:46] = COLOURS["red"], COLOURS["blue"]
    assert [f.kind for f in find_figures(touching)] == [("red", "square"), ("blue", "square")]


# Prompts of every tag


def need(
    shape: str, colour: str | None = None, place: str | None = None, count: int = 1, **more: object
) -> Requirement:
    return Requirement(shape, count, colour, place, **more)  # type: ignore[arg-type]


SINGLE = Prompt("single_object", (need("circle", place="top left"),))
COLOUR = Prompt("colors", (need("circle", "red"),))
TWO = Prompt("two_object", (need("circle", place="top left"), need("square", place="bottom right")))
COUNT = Prompt("counting", (need("circle", "red", count=3),))
ABOVE = Prompt("position", (need("circle", "red", position=("above", 1)), need("square", "blue")))
BINDING = Prompt("color_attr", (need("circle", "red"), need("square", "blue")))

at = replace
RIGHT = [
    (SINGLE, [RED]),
    (SINGLE, [at(RED, colour="black")]),
    (COLOUR, [at(RED, place="bottom right")]),
    (TWO, [at(RED, colour="green"), BLUE]),
    (COUNT, [RED, at(RED, place="top right"), at(RED, place="bottom right")]),
    (ABOVE, [RED, at(BLUE, place="bottom left")]),
    (ABOVE, [at(RED, place="top right"), at(BLUE, place="bottom left")]),
    (BINDING, [at(RED, place="bottom left"), at(BLUE, place="top right")]),
]
WRONG = [
    (SINGLE, [at(RED, place="top right")], "circle: found red circle at top right"),
    (SINGLE, [RED, GREEN], "not asked for: green triangle at top right"),
    (SINGLE, [], "circle: missing"),
    (COLOUR, [at(RED, colour="purple")], "red circle: found purple circle at top left"),
    (TWO, [at(RED, place="bottom right"), at(BLUE, place="top left")], "found"),
    (COUNT, [RED, at(RED, place="top right")], "red circle: missing"),
    (COUNT, [at(RED, place=place) for place in PLACES], "not asked for: red circle"),
    (COUNT, [RED, at(RED, place="top right"), at(GREEN, place="bottom right", shape="circle")], "found green circle"),
    (ABOVE, [at(RED, place="bottom left"), at(BLUE, place="top left")], "found red circle at bottom left"),
    (ABOVE, [RED, at(BLUE, place="top right")], "found"),
    (ABOVE, [RED], "blue square: missing"),
    (BINDING, [at(RED, colour="blue"), at(BLUE, colour="red")], "found"),
]


@pytest.mark.parametrize(("prompt", "figures"), RIGHT)
def test_right_pictures(prompt: Prompt, figures: list[Figure]) -> None:
    judgement = judge_picture(prompt, page(*figures))
    assert judgement.correct and judgement.faults == () and judgement.layout == 1
    assert [region.score for region in judgement.regions] == [1] * len(figures)


@pytest.mark.parametrize(("prompt", "figures", "fault"), WRONG)
def test_wrong_pictures(prompt: Prompt, figures: list[Figure], fault: str) -> None:
    judgement = judge_picture(prompt, page(*figures))
    assert not judgement.correct and fault in " / ".join(judgement.faults)
    assert all((region.score == 1) == (region.reason == "as asked") for region in judgement.regions)
    assert all(region.score < 0 for region in judgement.regions if region.reason != "as asked")


def test_regions_say_which_figure_is_wrong_and_where() -> None:
    """The scores that SRUM trains with: one right, one of another colour, one that nobody asked for, one missing."""
    prompt = Prompt("scene", (need("circle", "red", "top left"), need("square", "blue", "bottom right")))
    judged = judge_picture(prompt, page(RED, at(BLUE, colour="yellow"), GREEN))
    scores = {region.name: region.score for region in judged.regions}
    assert scores == {
        "red circle at top left": 1,
        "yellow square at bottom right": pytest.approx(-1 / 3),  # shape and place right, colour wrong
        "green triangle at top right": -1,
    }
    assert judged.layout == pytest.approx(1 / 3)  # both places are taken, the number of figures is wrong
    boxes = {region.name.split()[0]: region.box for region in judged.regions}
    assert np.abs(np.array(boxes["green"]) - np.array(GREEN.box) * 64).max() <= 1.5

    missing = judge_picture(prompt, page(RED))
    assert [(region.box, region.score) for region in missing.regions][1:] == [((32, 32, 64, 64), -1)]


def test_both_figures_of_a_wrong_relation_are_wrong() -> None:
    """Shape and colour are right, the position is not."""
    judged = judge_picture(ABOVE, page(at(RED, place="bottom left"), at(BLUE, place="top left")))
    assert [region.score for region in judged.regions] == pytest.approx([-1 / 3] * 2) and judged.layout == 0


def test_a_figure_is_not_wrong_because_another_is_missing() -> None:
    judged = judge_picture(ABOVE, page(RED))
    assert [(region.name, region.score) for region in judged.regions] == [("red circle at top left", 1)]
    assert not judged.correct and judged.layout == -1  # neither the number of figures nor the relation


def test_many_specks_are_judged_in_time() -> None:
    """What an untrained model draws: the matching stays bounded."""
    picture = generator("specks").integers(0, 256, (64, 64, 3)).astype(np.uint8)
    crowd = np.asarray(Image.fromarray(picture).resize((8, 8)).resize((64, 64), Image.Resampling.NEAREST))
    for drawn in (picture, crowd):
        assert not judge_picture(Prompt("scene", (need("circle"),) * 4), drawn).correct


# Edits


BEFORE, AFTER = Scene.of([RED, BLUE]), Scene.of([at(RED, colour="green"), BLUE])
RECOLOUR = Edit("recolour", "make the circle green", BEFORE, AFTER)
EDITED = [
    ("made and kept", [at(RED, colour="green"), BLUE], True, True),
    ("not made", [RED, BLUE], False, True),
    ("other colour", [at(RED, colour="black"), BLUE], False, True),
    ("rest recoloured", [at(RED, colour="green"), at(BLUE, colour="red")], True, False),
    ("rest removed", [at(RED, colour="green")], True, False),
    ("rest moved by 4 pixels", [at(RED, colour="green"), at(BLUE, dx=-4 / 64)], True, False),
    ("something added", [at(RED, colour="green"), BLUE, GREEN], True, False),
    ("all lost", [], False, False),
]


@pytest.mark.parametrize(("figures", "made", "kept"), [case[1:] for case in EDITED], ids=[case[0] for case in EDITED])
@pytest.mark.parametrize("name", ["none", "codec", "codec and noise of 20 levels"])
def test_edits(figures: list[Figure], made: bool, kept: bool, name: str) -> None:
    judged = judge_edit(RECOLOUR, page(RED, BLUE), DISTURBANCES[name](page(*figures)))
    assert (judged.made, judged.kept, judged.correct) == (made, kept, made and kept)
    assert bool(judged.faults) is not judged.correct


# Answers


@pytest.mark.parametrize(
    ("expected", "reply", "right"),
    [
        ("a red circle", "Red circle.", True),
        ("a red circle", "there is a red circle", True),
        ("a red circle", "a blue circle", False),
        ("a red circle", "a red circle and a blue square", False),
        ("at the top left", "Top left", True),
        ("at the top left", "top right", False),
        ("three", "3", True),
        ("three", "two", False),
        ("zero", "None", True),
        ("yes", "Yes, there is.", True),
        ("yes", "no", False),
        ("no", "No.", True),
        ("no", "there is nothing", False),
        ("yes", "", False),
        ("yes", "<think>there is no red circle</think> yes", True),
        ("nothing", "nothing", True),
    ],
)
def test_answers(expected: str, reply: str, right: bool) -> None:
    assert answer_matches(expected, reply) is right
