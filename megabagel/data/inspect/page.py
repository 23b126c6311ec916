"""A sample as a PNG page, drawn with Pillow alone: mask and table on top, texts and images below."""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

from megabagel.data.inspect.mask import COLOURS, HIDDEN, LOSS, Colour, draw_mask
from megabagel.data.inspect.table import HEADER, NUMERIC, cells, heading, summary
from megabagel.data.inspect.view import Branch, ImageView, Kind, SampleView, TextView

WIDTH, MARGIN = 1600, 48
MASK = 560
"""Largest side of the mask in pixels."""
COLUMNS, GUTTER = 3, 40
COLUMN = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GUTTER) // COLUMNS
PANEL_GAP = 14
PANEL = (COLUMN - PANEL_GAP) // 2
"""Longest side of an image in pixels."""
LINE, TEXT_LINES = 26, 8
"""Height of a line of text in pixels, and most lines per text; further tokens are only counted."""
TOKEN_LINE = (120, 124, 132, 90)
INK, FAINT, RULE = (32, 34, 40), (110, 116, 128), (222, 224, 228)
SPELLED = str.maketrans({"\u2192": ">", "\u00d7": "x", "\u2013": "-", "\u2014": "-", "\u2022": "*", "\n": "\u00b7"})
"""Replacements for characters that Pillow's built-in font lacks, and a middle dot for a line break."""


def draw_page(view: SampleView) -> Image.Image:
    """Draw the page; its height depends on the content."""
    blocks = [_title(view), _plan(view), *_contents(view)]
    page = Image.new("RGB", (WIDTH, MARGIN + sum(block.height + 24 for block in blocks)), "white")
    top = MARGIN
    for block in blocks:
        page.paste(block, (MARGIN, top))
        top += block.height + 24
    return page


def _title(view: SampleView) -> Image.Image:
    lines = [" ".join(line) for line in _lines(summary(view).split(), 18, WIDTH - 2 * MARGIN, gap=5)]
    block = _blank(52 + 26 * len(lines))
    name, _, rest = heading(view).partition("   ")
    _write(block, 0, 0, name, 30)
    _write(block, _length(name, 30) + 18, 10, rest, 18, FAINT)
    for number, line in enumerate(lines):
        _write(block, 0, 48 + 26 * number, line, 18, FAINT)
    return block


def _plan(view: SampleView) -> Image.Image:
    """Mask and legend, with the table of segments beside them."""
    mask, legend = draw_mask(view, MASK), _legend(view)
    table = _table(view)
    block = _blank(max(mask.height + 16 + legend.height, table.height))
    block.paste(mask, (0, 0))
    block.paste(legend, (0, mask.height + 16))
    block.paste(table, (mask.width + 40, 0))
    return block


def _legend(view: SampleView) -> Image.Image:
    used = [kind for kind in Kind if kind in {segment.kind for segment in view.segments}]
    entries = [*((COLOURS[kind], kind.value) for kind in used), (LOSS, "bears loss"), (HIDDEN, "masked")]
    block = Image.new("RGB", (MASK + 40, 28 * -(-len(entries) // 4)), "white")
    pen = ImageDraw.Draw(block)
    for number, (colour, name) in enumerate(entries):
        x, y = 150 * (number % 4), 28 * (number // 4)
        pen.rectangle((x, y + 3, x + 14, y + 17), colour, RULE)
        _write(block, x + 22, y, name, 16, INK)
    return block


def _table(view: SampleView) -> Image.Image:
    lines = [cells(number, segment) for number, segment in enumerate(view.segments)]
    widths = [max(_length(text, 16) for text in column) for column in zip(HEADER, *lines, strict=True)]
    gap, height = 16, 27
    block = Image.new("RGB", (sum(widths) + gap * len(widths) + 24, height * (len(lines) + 1) + 8), "white")
    pen = ImageDraw.Draw(block)
    pen.line((0, height, block.width, height), INK)
    for row, line in enumerate([HEADER, *lines]):
        segment = view.segments[row - 1] if row else None
        top = row * height + (6 if row else 0)
        if segment:
            tint = COLOURS[segment.kind]
            pen.rectangle((0, top + 2, 9, top + 18), "white" if segment.dropped else tint, tint)
            pen.line((0, top + height - 4, block.width, top + height - 4), RULE)
        x = 22
        for name, text, width in zip(HEADER, line, widths, strict=True):
            shift = width - _length(text, 16) if name in NUMERIC else 0
            _write(block, x + shift, top, text, 16, FAINT if segment is None or segment.dropped else INK)
            x += width + gap
    return block


def _contents(view: SampleView) -> Iterator[Image.Image]:
    """Texts and images in sequence order, COLUMNS per row."""
    cards = [
        _text(view, content) if isinstance(content, TextView) else _image(view, content) for content in view.contents
    ]
    for start in range(0, len(cards), COLUMNS):
        row = cards[start : start + COLUMNS]
        block = _blank(max(card.height for card in row))
        for number, card in enumerate(row):
            block.paste(card, (number * (COLUMN + GUTTER), 0))
        yield block


def _text(view: SampleView, content: TextView) -> Image.Image:
    """Card of a text: each token on its own tile."""
    kinds = _uses(view, content.slot)
    tint = COLOURS[next(iter(kinds))]
    lines = _lines([_spelled(token) for token in content.tokens], 17, COLUMN, gap=1)
    shown, hidden = lines[:TEXT_LINES], sum(map(len, lines[TEXT_LINES:]))
    card = Image.new("RGB", (COLUMN, 30 + LINE * (len(shown) + (hidden > 0))), "white")
    _write(card, 0, 0, f"item {content.slot}   {_described(kinds)}   {len(content.tokens)} ids", 15, FAINT)
    pen, count = ImageDraw.Draw(card), 0
    for row, line in enumerate(shown):
        x, y = 0, 28 + LINE * row
        for tile in line:
            width = _length(tile, 17)
            pen.rectangle((x, y, x + width, y + LINE - 3), _paler(tint, (0.88, 0.74)[count % 2]))
            _write(card, x, y + 1, tile, 17)
            x, count = x + width + 1, count + 1
    if hidden:
        _write(card, 0, 30 + LINE * len(shown), f"and {hidden} more", 16, FAINT)
    return card


def _image(view: SampleView, content: ImageView) -> Image.Image:
    """Card of an image as the VAE and the ViT get it, with lines between tokens."""
    card = Image.new("RGB", (COLUMN, 30 + PANEL + 26), "white")
    height, width = content.size
    header = f"item {content.slot}, {width} x {height}   {_described(_uses(view, content.slot))}"
    _write(card, 0, 0, header, 15, FAINT)
    panels = [(branch, _cut(branch)) for branch in content.branches]
    bottom = 34 + max(panel.height for _, panel in panels)
    for number, (branch, panel) in enumerate(panels):
        x = number * (PANEL + PANEL_GAP)
        card.paste(panel, (x, 30))
        rows, cols = branch.grid
        pixels = f"{branch.pixels.shape[1]} x {branch.pixels.shape[0]}"
        _write(card, x, bottom, f"{branch.name}: {pixels} pixels, {cols} x {rows} tokens", 14, FAINT)
    return card.crop((0, 0, COLUMN, bottom + 22))


def _cut(branch: Branch) -> Image.Image:
    """Scale the pixels of a branch to PANEL and draw lines between tokens."""
    (rows, cols), (height, width) = branch.grid, branch.pixels.shape[:2]
    scale = PANEL / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    filter = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    image = Image.fromarray(branch.pixels).resize(size, filter)
    pen = ImageDraw.Draw(image, "RGBA")
    for row in range(1, rows):
        pen.line((0, row * size[1] // rows, size[0], row * size[1] // rows), TOKEN_LINE)
    for col in range(1, cols):
        pen.line((col * size[0] // cols, 0, col * size[0] // cols, size[1]), TOKEN_LINE)
    pen.rectangle((0, 0, size[0] - 1, size[1] - 1), outline=(*RULE, 255))
    return image


def _uses(view: SampleView, slot: int) -> dict[Kind, bool]:
    """Kinds of the segments that an item is in, and whether each was dropped."""
    return {segment.kind: segment.dropped for segment in view.segments if slot in segment.slots}


def _described(kinds: dict[Kind, bool]) -> str:
    return ", ".join(f"{kind.value} (dropped)" if dropped else kind.value for kind, dropped in kinds.items())


def _lines(words: Sequence[str], size: int, room: int, gap: int) -> list[list[str]]:
    """Break words into lines of at most `room` pixels, with `gap` pixels between words."""
    lines: list[list[str]] = [[]]
    used = 0
    for word in words:
        width = _length(word, size) + gap
        if lines[-1] and used + width > room:
            lines.append([])
            used = 0
        lines[-1].append(word)
        used += width
    return lines


def _spelled(text: str) -> str:
    """Reduce a text to characters that the font has: accents are removed, unknown characters become `?`."""
    plain = unicodedata.normalize("NFKD", text.translate(SPELLED))
    kept = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return "".join(letter if letter == " " or _has_glyph(letter) else "?" for letter in kept)


@lru_cache(maxsize=4096)
def _has_glyph(letter: str) -> bool:
    font = _font(17)
    # Pillow has no query for glyphs: a missing one is drawn like U+FFFF, which no font has.
    return bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _length(text: str, size: int) -> int:
    return round(_font(size).getlength(text))


def _write(page: Image.Image, x: int, y: int, text: str, size: int, colour: Colour = INK) -> None:
    ImageDraw.Draw(page).text((x, y), _spelled(text), colour, _font(size))


def _blank(height: int) -> Image.Image:
    return Image.new("RGB", (WIDTH - 2 * MARGIN, height), "white")


def _paler(colour: Colour, share: float) -> Colour:
    red, green, blue = (round(level + (255 - level) * share) for level in colour)
    return red, green, blue
