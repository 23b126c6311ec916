"""Synthetic data set `scenes`: pages with one to four coloured figures, for drawing, editing, questions and thinking.

    draw-*.tar       an image with several captions (t2i): a full description, and prompts of GenEval's tags
    ask-*.tar        a conversation about an image (i2t): what, which colour, where, how many, yes/no, describe
    edits-*.tar      before, instruction, after (edit): one figure changes, or two in one instruction, or, one in eight,
                     a chain of three images
    concepts-*.tar   edits whose instruction describes figures or colours instead of naming them (edit)
    think-*.tar      such edits, riddles to draw and questions to answer, each with a thought in <think> tags as a
                     training target (interleave); they begin with the system prompts of the released inference code
    tokenizer.json   a byte-level BPE trained on all the texts

Samples have the layouts of the released data sets (`data/formats/records.py`). Sample i of a kind depends only on
(seed, kind, i). No image shows a combination that is held out for evaluation (`scenes_text.py`).
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megabagel.data.builders.once import write_once
from megabagel.data.builders.scenes_edits import Edit, conceptual, riddle, simple_edit, two_step
from megabagel.data.builders.scenes_page import PLACES, Scene, pick, random_figure, render
from megabagel.data.builders.scenes_text import Question, full_prompt, held_out, prompts, questions
from megabagel.data.formats.shards import write_shards
from megabagel.data.tokenize.bpe import train_bpe
from megabagel.sequence.keys import generator

MARKER = "scenes.json"
"""Marker file, written last; holds the parameters of the data set."""
VOCABULARY = 512
SAMPLES_PER_SHARD = 1000
FIGURES = (0.3, 0.3, 0.2, 0.2)
"""Share of pages with one, two, three and four figures."""

DESCRIBE = "what do you see?"

THINK_TO_ANSWER = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think>"
    " answer here"
)
THINK_TO_DRAW = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think>"
    " image here"
)
"""System prompts of the released inference code, character for character, so that training matches inference."""

Files = dict[str, bytes]
"""{extension: bytes} of one sample."""
Make = Callable[[np.random.Generator, int], Files]


def write_scenes(root: Path, *, samples: int, size: int, seed: int) -> None:
    """Write the data set and its tokenizer, unless it exists. Deterministic.

    Args:
        root: folder of the data set.
        samples: pages to draw, and edits. Of pages with questions there are half as many; of conceptual edits and of
            samples with thoughts an eighth each.
        size: side of the images in pixels.
        seed: of all random draws.

    Raises:
        UserError: `root` holds a scene data set with other parameters, or cannot be written.
    """
    wanted = {"format": 1, "samples": samples, "size": size, "seed": seed}
    write_once(root / MARKER, "scene", wanted, lambda stage: _write(stage, samples, size, seed))


def _write(folder: Path, samples: int, size: int, seed: int) -> None:
    kinds: tuple[tuple[str, Make, int], ...] = (
        ("draw", _draw, samples),
        ("ask", _ask, samples // 2),
        ("edits", _edit, samples),
        ("concepts", _concept, samples // 8),
        ("think", _think, samples // 8),
    )
    texts: list[str] = []
    for kind, make, count in kinds:
        made = [(f"{i:06d}", make(generator(seed, "scenes", kind, i), size)) for i in range(count)]
        write_shards(folder, kind, made, SAMPLES_PER_SHARD)
        texts += [text for _, files in made for text in _texts(json.loads(files["json"]))]
    (folder / "tokenizer.json").write_text(train_bpe(texts, VOCABULARY))


def random_scene(rng: np.random.Generator, kept: Callable[[Scene], bool] = lambda scene: not held_out(scene)) -> Scene:
    """A random page of one to four figures for which `kept` is true; by default a page that is not held out.

    With probability 0.3 a page of several figures repeats a single colour and shape, so that there is something to
    count.
    """
    # By rejection: the rule of held-out pages depends on the whole page, not on one figure.
    while True:
        count = 1 + int(rng.choice(len(FIGURES), p=FIGURES))
        places = [list(PLACES)[i] for i in rng.permutation(len(PLACES))[:count]]
        figures = [random_figure(rng, (place,)) for place in places]
        if count > 1 and rng.random() < 0.3:
            first = figures[0]
            figures = [type(f)(*first.kind, f.place, f.dx, f.dy, f.radius) for f in figures]
        if kept(scene := Scene.of(figures)):
            return scene


def random_edit(
    rng: np.random.Generator, make: Callable[[Scene, np.random.Generator], Edit], scene: Scene | None = None
) -> Edit:
    """A random edit whose result is not held out, of `scene` or of a random page."""
    while True:
        edit = make(scene or random_scene(rng), rng)
        if not held_out(edit.after):
            return edit


def _draw(rng: np.random.Generator, size: int) -> Files:
    scene = random_scene(rng)
    captions = {f"{prompt.tag}_{n}": prompt.text for n, prompt in enumerate(prompts(scene))}
    return _sample({"image": "0.png", "captions": json.dumps(captions)}, size, scene)


def _ask(rng: np.random.Generator, size: int) -> Files:
    """A conversation: questions in random order, or on one page of three a description instead."""
    scene = random_scene(rng)
    asked = questions(scene, rng)
    # One of the yes/no pair at the end is removed, at random.
    asked.pop(int(rng.integers(len(asked) - 2, len(asked))))
    # Short answers can be guessed well without looking at the image: a run on them alone stayed at a cross-entropy of
    # 0.53 to 0.59 from step 40 to 110. A description needs every figure.
    if rng.random() < 1 / 3:
        asked = [Question("describe", DESCRIBE, full_prompt(scene).text)]
    turns: list[dict[str, str]] = []
    for number in rng.permutation(len(asked)):
        question = asked[number].text if turns else f"<image>{asked[number].text}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": asked[number].answer}]
    return _sample({"conversations": turns, "image": "0.png"}, size, scene)


def _edit(rng: np.random.Generator, size: int) -> Files:
    draw = rng.random()
    first = random_edit(rng, two_step if draw < 0.25 else simple_edit)
    steps = [first, random_edit(rng, simple_edit, first.after)] if draw > 0.875 else [first]
    return _edits(steps, size)


def _concept(rng: np.random.Generator, size: int) -> Files:
    return _edits([random_edit(rng, conceptual)], size)


def _edits(steps: list[Edit], size: int) -> Files:
    """Files of a chain of edits in the released layout."""
    scenes = [steps[0].before, *(step.after for step in steps)]
    names = [f"{n}.png" for n in range(len(scenes))]
    return _sample({"image_list": names, "instruction_list": [[step.instruction] for step in steps]}, size, *scenes)


def _think(rng: np.random.Generator, size: int) -> Files:
    """An interleaved document: system prompt, page and instruction, thought, and the resulting image or answer."""
    match pick(rng, ("draw", "edit", "answer")):
        case "draw":
            scene = random_scene(rng, lambda scene: len(scene.figures) < 3 and not held_out(scene))
            asked, thought = riddle(scene)
            items = [_text(THINK_TO_DRAW), _text(asked), _text(_tags(thought), "target"), _image(0, "target")]
            return _sample({"items": items}, size, scene)
        case "edit":
            edit = random_edit(rng, conceptual)
            items = [_text(THINK_TO_DRAW), _image(0, "condition"), _text(edit.instruction)]
            items += [_text(_tags(edit.thought), "target"), _image(1, "target")]
            return _sample({"items": items}, size, edit.before, edit.after)
        case _:
            scene = random_scene(rng)
            question = pick(rng, questions(scene, rng))
            answer = f"{_tags(f'there is {full_prompt(scene).text}')} {question.answer}"
            items = [_text(THINK_TO_ANSWER), _image(0, "look"), _text(question.text), _text(answer, "target")]
            return _sample({"items": items}, size, scene)


def _tags(thought: str) -> str:
    return f"<think>{thought}</think>"


def _text(text: str, role: str = "condition") -> dict[str, str]:
    return {"type": "text", "text": text, "role": role}


def _image(number: int, role: str) -> dict[str, str]:
    return {"type": "image", "name": f"{number}.png", "role": role}


def _sample(record: dict[str, Any], size: int, *scenes: Scene) -> Files:
    """Files of a sample: the record, and the pages as its images `0.png`, `1.png`, ..."""
    return {"json": json.dumps(record).encode(), **{f"{n}.png": png(scene, size) for n, scene in enumerate(scenes)}}


def png(scene: Scene, size: int) -> bytes:
    """The page as a PNG file."""
    buffer = io.BytesIO()
    # Level 1 takes half the time of the default and 5 % more bytes.
    render(scene, size).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _texts(record: dict[str, Any]) -> Iterator[str]:
    """All texts of a record, for the tokenizer."""
    yield from json.loads(record.get("captions", "{}")).values()
    yield from (turn["value"].removeprefix("<image>") for turn in record.get("conversations", ()))
    yield from (text for step in record.get("instruction_list", ()) for text in step)
    yield from (item["text"] for item in record.get("items", ()) if item["type"] == "text")
