"""A sample as a self-contained HTML page: images and the attention mask are embedded as PNG."""

import base64
import html
import io

from PIL import Image

from megabagel.data.inspect.mask import COLOURS, HIDDEN, LOSS, Colour, draw_mask
from megabagel.data.inspect.table import HEADER, NUMERIC, cells, heading, summary
from megabagel.data.inspect.view import ImageView, Kind, SampleView, TextView
from megabagel.errors import printable


def escape(text: str) -> str:
    """Escape markup and invisible characters of untrusted text for HTML."""
    return html.escape(printable(text, keep="\n\t"))


MASK = 720
"""Largest side of the mask in pixels."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202228; max-width: 1500px; margin: 2rem auto; padding: 0 2rem }
h1 { font-weight: 500; font-size: 1.6rem; margin-bottom: 0 }
.faint { color: #6e7480 } .plan { display: flex; flex-wrap: wrap; gap: 2.5rem; align-items: flex-start }
img { image-rendering: pixelated; border: 1px solid #dee0e4; display: block } .mask { border: none; width: 36rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { font-weight: 400; color: #6e7480 }
th, td { text-align: left; padding: .15rem .5rem; border-bottom: 1px solid #dee0e4; white-space: nowrap }
.right { text-align: right } .dropped td { color: #9aa0aa }
.swatch { display: inline-block; width: .9em; height: .9em; margin: 0 .4em -.1em 0; border: 1px solid #dee0e4 }
.token { padding: 0 1px; margin-right: 1px; white-space: pre-wrap } .text { line-height: 1.8 }
.branches { display: flex; gap: 1.5rem } figure { margin: 0 } .branches img { height: 15rem }
"""


def draw_html(view: SampleView) -> str:
    """The HTML page: mask and table on top, texts and images in sequence order below."""
    name, _, rest = heading(view).partition("   ")
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>',
        f'<h1>{escape(name)}</h1><p class="faint">{escape(rest)}<br>{escape(summary(view))}</p>',
        f'<div class="plan"><div>{_png(draw_mask(view, MASK), "mask")}{_legend(view)}</div>{_table(view)}</div>',
        *(_text(view, content) if isinstance(content, TextView) else _image(content) for content in view.contents),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _legend(view: SampleView) -> str:
    used = {segment.kind for segment in view.segments}
    entries = [
        *((COLOURS[kind], kind.value) for kind in Kind if kind in used),
        (LOSS, "bears loss"),
        (HIDDEN, "masked"),
    ]
    return "<p>" + " &ensp; ".join(f"{_swatch(colour)}{name}" for colour, name in entries) + "</p>"


def _table(view: SampleView) -> str:
    sides = [' class="right"' if name in NUMERIC else "" for name in HEADER]
    lines = ["".join(f"<th{side}>{name}</th>" for name, side in zip(HEADER, sides, strict=True))]
    for number, segment in enumerate(view.segments):
        first, *others = (f"<td{side}>{cell}</td>" for cell, side in zip(cells(number, segment), sides, strict=True))
        swatch = _swatch(HIDDEN if segment.dropped else COLOURS[segment.kind])
        lines.append(first.replace(">", f">{swatch}", 1) + "".join(others))
    dropped = [False, *(segment.dropped for segment in view.segments)]
    rows = (f'<tr class="{"dropped" if gone else ""}">{line}</tr>' for line, gone in zip(lines, dropped, strict=True))
    return f"<table>{''.join(rows)}</table>"


def _text(view: SampleView, content: TextView) -> str:
    kind = next(segment.kind for segment in view.segments if content.slot in segment.slots)
    red, green, blue = COLOURS[kind]
    tiles = (
        f'<span class="token" style="background: rgba({red}, {green}, {blue}, {(0.12, 0.26)[number % 2]})">'
        f"{escape(token)}</span>"
        for number, token in enumerate(content.tokens)
    )
    header = f"item {content.slot}, {kind.value}, {len(content.tokens)} ids"
    return f'<p class="text"><span class="faint">{header}</span><br>{"".join(tiles)}</p>'


def _image(content: ImageView) -> str:
    figures = []
    for branch in content.branches:
        height, width = branch.pixels.shape[:2]
        rows, cols = branch.grid
        caption = f"{branch.name}: {width} x {height} pixels, {cols} x {rows} tokens"
        picture = _png(Image.fromarray(branch.pixels), "branch")
        figures.append(f'<figure>{picture}<figcaption class="faint">{caption}</figcaption></figure>')
    header = f"item {content.slot}, {content.role}, file {content.size[1]} x {content.size[0]}"
    return f'<p class="faint">{header}</p><div class="branches">{"".join(figures)}</div>'


def _png(image: Image.Image, name: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return (
        f'<img class="{name}" alt="{name}" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'
    )


def _swatch(colour: Colour) -> str:
    return f'<span class="swatch" style="background: rgb{colour}"></span>'
