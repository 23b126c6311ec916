"""A self-contained page of judged pictures: picture, regions with scores, map over pixels, weight of each latent token.

The weights are those of training: the same functions, rules from the same config section.
"""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from megabagel.config.schema import RewardConfig
from megabagel.data.files import write_atomic
from megabagel.errors import UserError, printable
from megabagel.posttrain.boxes import open_picture
from megabagel.posttrain.journal import Record, read_records
from megabagel.posttrain.judging import JUDGED, reward_of
from megabagel.rewards.regions import Reward
from megabagel.rewards.weights import global_factor, reward_map, token_weights

SIDE = 256
"""Longest side of each panel in pixels."""
GOOD, BAD, NONE = (20, 130, 60), (190, 40, 40), (110, 110, 110)

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202228; max-width: 1200px; margin: 2rem auto; padding: 0 2rem }
h1 { font-weight: 500; font-size: 1.6rem } h2 { font-weight: 500; font-size: 1.1rem; margin: 2rem 0 .3rem }
.faint { color: #6e7480 } .panels { display: flex; flex-wrap: wrap; gap: 1rem } figure { margin: 0 }
img { image-rendering: pixelated; border: 1px solid #dee0e4; display: block } figcaption { color: #6e7480 }
table { border-collapse: collapse } td, th { text-align: left; padding: .1rem .6rem; border-bottom: 1px solid #dee0e4 }
"""


def show(work: Path, out: Path, rules: RewardConfig, stride: int, most: int = 50, pngs: Path | None = None) -> int:
    """Write the page `out`; returns the number of pictures on it.

    Args:
        work: folder of the pipeline.
        out: HTML file.
        rules: section `reward` of the training config.
        stride: pixels per latent token and side.
        most: pictures on the page, the first ones of the file.
        pngs: folder for one PNG per picture, too.

    Raises:
        UserError: nothing is judged, a picture is missing, or a file cannot be written.
    """
    records = list(read_records(work / JUDGED, "image_file"))[:most]
    if not records:
        raise UserError(f"{work / JUDGED}: no scores; run `megabagel posttrain judge` first")
    parts = [
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{_escape(work.name)}</title>',
        f"<style>{STYLE}</style><h1>{_escape(work.name)}: {len(records)} judged pictures</h1>",
        f'<p class="faint">reward: {_escape(str(rules))}, {stride} pixels per token</p>',
    ]
    for record in records:
        panels = panels_of(work, record, rules, stride)
        parts.append(_entry(record, panels))
        if pngs is not None:
            _write(pngs / record["image_file"], _png(side_by_side(list(panels.values()))))
    _write(out, "\n".join([*parts, "</html>\n"]).encode())
    return len(records)


def panels_of(work: Path, record: Record, rules: RewardConfig, stride: int) -> dict[str, Image.Image]:
    """Picture, regions, map and weights of a judged record, by caption.

    Args:
        work: folder of the pipeline.
        record: judged.
        rules: map from scores to weights.
        stride: pixels per side of a latent token.
    """
    image, _ = open_picture(work, record["image_file"])
    reward, size = reward_of(record), (image.height, image.width)
    grid = max(round(size[0] / stride), 1), max(round(size[1] / stride), 1)
    map_hw = global_factor(reward, rules) * reward_map(reward, size, rules)
    weights_hw = token_weights(reward, size, grid, rules).total_L.reshape(grid)
    scale = SIDE / max(size)
    shown = (max(round(size[1] * scale), 1), max(round(size[0] * scale), 1))
    return {
        "picture": image.resize(shown, Image.Resampling.NEAREST),
        "regions": _regions(image.resize(shown, Image.Resampling.NEAREST), record, scale),
        "alpha * R over pixels": heat(map_hw, 1.0).resize(shown, Image.Resampling.NEAREST),
        "weight per latent token": _numbers(heat(weights_hw, 1.5).resize(shown, Image.Resampling.NEAREST), weights_hw),
    }


def heat(values_hw: np.ndarray, most: float) -> Image.Image:
    """Values as colours: 0 white, `most` green, -`most` red."""
    share_hw = np.clip(values_hw / most, -1, 1)[..., None]
    end_hw3 = np.where(share_hw >= 0, np.array(GOOD), np.array(BAD))
    mixed_hw3 = 255 + (end_hw3 - 255) * np.abs(share_hw)
    return Image.fromarray(mixed_hw3.round().astype(np.uint8))


def _regions(image: Image.Image, record: Record, scale: float) -> Image.Image:
    pen = ImageDraw.Draw(image)
    for region in record["regions"]:
        score = region["score"]
        colour = NONE if score is None else GOOD if score > 0 else BAD
        left, top, right, bottom = (edge * scale for edge in region["box"])
        pen.rectangle((left, top, right - 1, bottom - 1), outline=colour, width=2)
        pen.text((left + 3, top + 2), "no score" if score is None else f"{score:+.2f}", fill=colour)
    return image


def _numbers(image: Image.Image, weights_hw: np.ndarray) -> Image.Image:
    """Write weights into the cells where they are large enough for a number."""
    rows, columns = weights_hw.shape
    cell_w, cell_h = image.width / columns, image.height / rows
    if min(cell_w, cell_h) >= 24:
        pen = ImageDraw.Draw(image)
        for row in range(rows):
            for column in range(columns):
                at = (column * cell_w + 3, row * cell_h + cell_h / 2 - 6)
                pen.text(at, f"{weights_hw[row, column]:.2f}", fill=(20, 20, 20))
    return image


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Images of one height in a row."""
    sheet = Image.new("RGB", (sum(i.width + 8 for i in images) - 8, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width + 8
    return sheet


def _entry(record: Record, panels: dict[str, Image.Image]) -> str:
    figures = "".join(
        f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(_png(image)).decode()}">'
        f"<figcaption>{name}</figcaption></figure>"
        for name, image in panels.items()
    )
    rows = "".join(
        f"<tr><td>{_escape(r['name'] or '?')}</td><td>{_score(r['score'])}</td><td>{_escape(r['reason'])}</td></tr>"
        for r in record["regions"]
    )
    reward: Reward = reward_of(record)
    whole = f"layout {_score(reward.layout)}, whole picture {_score(reward.overall)}"
    return (
        f"<h2>{_escape(record['prompt'])}</h2><p class='faint'>{_escape(record['image_file'])}: {whole}, judge "
        f"{_escape(record['judge'])}</p><div class='panels'>{figures}</div><table>{rows}</table>"
    )


def _score(score: float | None) -> str:
    return "none" if score is None else f"{score:+.2f}"


def _escape(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); choose a folder with space and rights"
        ) from error
