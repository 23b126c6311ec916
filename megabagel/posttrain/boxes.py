"""Stage `boxes`: regions of every drawn picture (SRUM section 3.1), resumable.

    WORK/boxes.jsonl     image_file, size [w, h], boxes [[left, top, right, bottom], ...] in its pixels

Methods: `scenes` finds the figures of the drawn world; `grid` cuts cells; `sam` is the Segment Anything model, as the
released pipeline uses it, where its package and weights are installed; `model` asks the model itself; an address
starting with http:// or https:// gets the PNG by POST and answers {"boxes": [...]}.
"""

import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megabagel.errors import UserError
from megabagel.evaluation.shapes_vision import find_figures
from megabagel.locks import inside, locked
from megabagel.posttrain.journal import DRAWN, IMAGES, Journal, Record, append_to, read_records
from megabagel.posttrain.ranks import first_rank
from megabagel.rewards.regions import BadReward, Box, read_box
from megabagel.runtime.collective_errors import from_rank0

# Stages without a model start without megatron-core, whose import takes seconds.
if TYPE_CHECKING:
    from megabagel.inference.api import Pipeline

logger = logging.getLogger(__name__)

BOXES = "boxes.jsonl"
TRIES, PATIENCE_S, TIMEOUT_S = 4, 2.0, 120.0
"""Of a detector over HTTP."""

Propose = Callable[[Image.Image, bytes, str], Sequence[Box]]
"""(picture, its file, prompt) -> boxes, best first."""


@dataclass(frozen=True)
class BoxOptions:
    """How regions are found."""

    method: str = "scenes"
    """`scenes`, `grid`, `sam`, `model`, or an address."""
    most: int = 10
    """Most boxes of a picture, as released."""
    smallest: float = 0.001
    """Least share of the picture's area."""
    cells: int = 2
    """`grid`: cells per side."""
    weights: str | None = None
    """`sam`: file of its weights (ViT-H)."""
    keep_named: bool = False
    """Let the model keep only boxes that show something of the prompt: the paper's filter, which the released code
    lacks."""


def find_boxes(work: Path, options: BoxOptions, model: "Pipeline | None" = None) -> dict[str, int]:
    """Find the regions of all drawn pictures that `work` lacks; returns counts. Called on all ranks.

    Args:
        work: folder of the pipeline.
        options: settings of the stage.
        model: for method `model` and the filter.

    Raises:
        UserError: the folder is in use, a picture or the detector is missing, or nothing can be written.
    """
    if not first_rank():
        return _find_boxes(work, options, model)
    with locked(inside(work), str(work)):
        return _find_boxes(work, options, model)


def _find_boxes(work: Path, options: BoxOptions, model: "Pipeline | None") -> dict[str, int]:
    settings = {name: getattr(options, name) for name in options.__dataclass_fields__}
    journals: list[Journal] = []

    def begin() -> list[Record]:
        journals.append(Journal(work / BOXES, "image_file", settings))
        return [one for one in drawn_pictures(work) if one["image_file"] not in journals[0]]

    left = from_rank0(begin)
    propose, total, dropped = proposer(options, model), 0, 0
    for record in left:
        image, blob = open_picture(work, record["image_file"])
        found = usable(propose(image, blob, record["prompt"]), image.size, options)
        kept = [box for box in found if not options.keep_named or _named(model, image, box, record["prompt"])]
        total, dropped = total + len(kept), dropped + len(found) - len(kept)
        result = {"image_file": record["image_file"], "size": list(image.size), "boxes": [list(box) for box in kept]}
        result["filtered"] = len(found) - len(kept)
        from_rank0(partial(append_to, journals, result))
    return {"pictures": len(left), "boxes": total, "filtered": dropped}


def drawn_pictures(work: Path) -> Iterator[Record]:
    """Records of pictures that were drawn, failed ones left out. Raises UserError if there are none."""
    found = [record for record in read_records(work / DRAWN, "image_file") if "error" not in record]
    if not found:
        raise UserError(f"{work / DRAWN}: no drawn picture; run `megabagel posttrain generate` first")
    yield from found


def open_picture(work: Path, name: str) -> tuple[Image.Image, bytes]:
    """A drawn picture as RGB, and its file. Raises UserError if it is missing or damaged."""
    path = work / IMAGES / name
    try:
        blob = path.read_bytes()
        with Image.open(path) as image:
            return image.convert("RGB"), blob
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Bring it back, or remove its line from {DRAWN} and generate again."
        ) from error


def usable(boxes: Sequence[Box], size: tuple[int, int], options: BoxOptions) -> list[Box]:
    """Boxes cut to the picture, without repeats and small ones, at most `options.most`."""
    width, height = size
    kept: dict[Box, None] = {}
    for left, top, right, bottom in boxes:
        box = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        area = max(box[2] - box[0], 0) * max(box[3] - box[1], 0)
        if box[0] < box[2] and box[1] < box[3] and area >= options.smallest * width * height:
            kept[box] = None
    return list(kept)[: options.most]


def proposer(options: BoxOptions, model: "Pipeline | None") -> Propose:
    """The function behind `options.method`. Raises UserError for one that is unknown or not installed."""
    method = options.method
    if method == "scenes":
        return lambda image, blob, prompt: [figure.box for figure in find_figures(np.asarray(image))]
    if method == "grid":
        return lambda image, blob, prompt: _cells(image.size, options.cells)
    if method.startswith(("http://", "https://")):
        return lambda image, blob, prompt: _ask_detector(method, blob)
    if method == "sam":
        return _sam(options)
    if method == "model" and model is not None:
        return lambda image, blob, prompt: _ask_model(model, image, prompt)
    raise UserError(f"boxes: method {method!r}: expected scenes, grid, sam, model (with a checkpoint) or an address")


def _cells(size: tuple[int, int], cells: int) -> list[Box]:
    columns, rows = ([side * n // cells for n in range(cells + 1)] for side in size)
    return [
        (columns[x], rows[y], columns[x + 1], rows[y + 1])
        for y in range(cells)
        for x in range(cells)
    ]  # fmt: skip


def _ask_detector(address: str, blob: bytes) -> list[Box]:
    """Boxes of a detector over HTTP; a failing one is asked again after a pause."""
    request = urllib.request.Request(address, blob, {"Content-Type": "image/png"})
    for turn in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                content = json.loads(answer.read(2**24))
            return [read_box(f"boxes[{n}]", box) for n, box in enumerate(content["boxes"])]
        except (OSError, urllib.error.URLError) as error:
            failure: Exception = error
            time.sleep(PATIENCE_S * 2**turn if turn + 1 < TRIES else 0)
        except (ValueError, KeyError, TypeError, BadReward) as error:
            raise UserError(f'{address}: expected {{"boxes": [[left, top, right, bottom], ...]}} ({error})') from error
    raise UserError(f"{address}: no answer in {TRIES} tries ({failure}); start the detector and run this again")


def _sam(options: BoxOptions) -> Propose:
    """Automatic masks of SAM ViT-H with its default settings, largest first, as the released pipeline."""
    try:
        from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
    except ImportError as error:
        raise UserError("boxes: method sam needs the package segment-anything; install it, or use another") from error
    if options.weights is None or not Path(options.weights).is_file():
        raise UserError(f"boxes: weights of SAM: {options.weights}: no such file; name sam_vit_h_4b8939.pth")
    masks = SamAutomaticMaskGenerator(sam_model_registry["vit_h"](checkpoint=options.weights))

    def propose(image: Image.Image, blob: bytes, prompt: str) -> list[Box]:
        found = sorted(masks.generate(np.asarray(image)), key=lambda mask: -mask["area"])
        corners = ((*map(int, mask["bbox"][:2]), *map(int, mask["bbox"][2:])) for mask in found)
        return [(left, top, left + width, top + height) for left, top, width, height in corners]

    return propose


_BOX = re.compile(r"\[\s*(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)[\s,]+(-?\d+)\s*\]")


def _ask_model(model: "Pipeline", image: Image.Image, prompt: str) -> list[Box]:
    width, height = image.size
    question = (
        f'This picture of {width} x {height} pixels was drawn for "{prompt}". List the bounding box of every object '
        "and of the background areas that matter, one per line, as [left, top, right, bottom] in pixels."
    )
    answer = model.ask([image], question, max_new_tokens=1024)
    return [tuple(map(int, found)) for found in _BOX.findall(answer)]  # type: ignore[misc]


def _named(model: "Pipeline | None", image: Image.Image, box: Box, prompt: str) -> bool:
    """Whether the model finds something of the prompt in a region; any answer but no keeps it."""
    if model is None:
        raise UserError("boxes: the filter needs the model; name a checkpoint")
    question = f'Does this show something that belongs to "{prompt}"? Answer yes or no.'
    answer = model.ask([image.crop(box)], question, max_new_tokens=8)
    return not answer.strip().lower().startswith("no")
