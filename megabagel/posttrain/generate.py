"""Stage `generate`: prompts -> candidate pictures (SRUM section 3.1), resumable.

    WORK/drawn.jsonl     one record per picture: image_file, prompt, id, candidate, seed, size, thought, item
    WORK/images/         ID_CANDIDATE.png, with all settings in its metadata

The seed of a picture is keyed by prompt id and candidate, so neither order nor a kill changes a picture.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from megabagel.errors import UserError
from megabagel.inference.api import Pipeline
from megabagel.inference.generated import Generated
from megabagel.inference.presets import DRAW, adjusted, preset
from megabagel.journal import write_whole
from megabagel.locks import inside, locked
from megabagel.posttrain.journal import DRAWN, IMAGES, Journal
from megabagel.posttrain.ranks import first_rank
from megabagel.runtime.collective_errors import from_rank0
from megabagel.sequence.keys import seed64

logger = logging.getLogger(__name__)

GROUP = 16
"""Pictures that are submitted to the engine together."""


@dataclass(frozen=True)
class DrawOptions:
    """How candidates are drawn. None: the model's preset."""

    candidates: int = 1
    size: tuple[int, int] | None = None
    """Width and height in pixels."""
    steps: int | None = None
    """Grid points of the sampler."""
    text_scale: float | None = None
    think: bool = False
    """Plan each picture in words first, as the paper does."""
    seed: int = 0


def generate(model: Pipeline, prompts: Sequence[dict[str, Any]], work: Path, options: DrawOptions) -> dict[str, int]:
    """Draw all candidates that `work` lacks; returns counts. Called on all ranks.

    Args:
        model: draws.
        prompts: from `read_prompts`.
        work: folder of the pipeline.
        options: settings of the stage.

    Raises:
        UserError: the folder is in use, was begun with other settings, or cannot be written.
    """
    if not first_rank():
        return _generate(model, prompts, work, options)
    with locked(inside(work), str(work)):
        return _generate(model, prompts, work, options)


def _generate(model: Pipeline, prompts: Sequence[dict[str, Any]], work: Path, options: DrawOptions) -> dict[str, int]:
    settings = {
        "candidates": options.candidates,
        "size": options.size and list(options.size),
        "steps": options.steps,
        "text_scale": options.text_scale,
        "think": options.think,
        "seed": options.seed,
        "weights": model.source.digest,
    }
    journals: list[Journal] = []

    def begin() -> list[str]:
        journals.append(Journal(work / DRAWN, "image_file", settings))
        (work / IMAGES).mkdir(exist_ok=True)
        return [name for name in journals[0].records if _there(work, journals[0].records[name])]

    known = set(from_rank0(begin))
    wanted = [(prompt, n) for prompt in prompts for n in range(options.candidates)]
    left = iter([(prompt, n) for prompt, n in wanted if name_of(prompt, n) not in known])
    drawn = failed = 0
    while group := list(islice(left, GROUP)):
        for (prompt, number), result in zip(group, _pictures(model, group, options), strict=True):
            failed += isinstance(result, str)
            drawn += not isinstance(result, str)
            from_rank0(partial(_keep, journals, work, prompt, number, result))
    return {"prompts": len(prompts), "pictures": len(wanted), "known": len(wanted) - drawn - failed, "drawn": drawn,
            "failed": failed}  # fmt: skip


def name_of(prompt: dict[str, Any], candidate: int) -> str:
    """File name of a candidate."""
    return f"{prompt['id']}_{candidate}.png"


def _there(work: Path, record: dict[str, Any]) -> bool:
    """Whether the picture of a record is on disk; a missing one has to be restored by hand or drawn anew."""
    if "error" not in record and not (work / IMAGES / record["image_file"]).is_file():
        raise UserError(
            f"{work / IMAGES / record['image_file']}: is named in {DRAWN} and missing. Bring it back, or remove its "
            "line to have it drawn again."
        )
    return True


def _pictures(
    model: Pipeline, group: Sequence[tuple[dict[str, Any], int]], options: DrawOptions
) -> Iterator[Generated | str]:
    """A picture or the reason of its failure for each item of a group, in order."""
    given = {"points": options.steps, "text_scale": options.text_scale, "think": options.think}
    # Settings that no prompt could be drawn with end the stage here; below, an error belongs to one prompt.
    model.grid(options.size, None)
    adjusted(preset(DRAW).draw, points=options.steps, text_scale=options.text_scale)
    requests: list[Any] = []
    for prompt, number in group:
        seed = seed64(options.seed, "candidate", prompt["id"], number) % 2**31
        try:
            requests.append(model.submit_draw([prompt["prompt"]], 1, options.size, seed, **given))
        except UserError as error:
            requests.append(str(error))
    for request in requests:
        if isinstance(request, str):
            yield request
            continue
        for _ in model.stream(request):
            pass
        yield request.done.error if request.done.error is not None else request.done.result[0]


def _keep(
    journals: Sequence[Journal], work: Path, prompt: dict[str, Any], number: int, result: Generated | str
) -> None:
    (journal,) = journals  # rank 0 has opened it
    name = name_of(prompt, number)
    item = {key: value for key, value in prompt.items() if key not in ("id", "prompt")}
    record = {"image_file": name, "id": prompt["id"], "candidate": number, "prompt": prompt["prompt"], "item": item}
    if isinstance(result, str):
        logger.warning("%s: not drawn: %s", name, result)
        journal.append({**record, "error": result})
        return
    path = work / IMAGES / name
    write_whole(path, result.png())
    about = result.about
    journal.append(
        {**record, "size": [about["width"], about["height"]], "seed": about["seed"], "thought": about["thought"]}
    )
