"""Turn the stamps of Debian's package tuxpaint-stamps-default into shards: real photographs and drawings with captions.

    apt-get install tuxpaint-stamps-default      # about 950 captioned images
    pip install -e ".[svg]"                      # optional: without it the stamps that exist as SVG only are left out
    python tools/build_stamps.py --out runs/stamps

The caption is the English one; a source can be read as captions to draw (task t2i) or as pictures to describe (i2t).
PNG files stay as they are; an SVG is drawn at 512 pixels on its longest side, unless a PNG of the same name exists.
Takes about half a minute; equal stamps give equal bytes.
"""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path

from PIL import Image

from megabagel.curation.draft import Draft, Picture, Text, plain_key
from megabagel.curation.samples import captioned, write_corpus
from megabagel.curation.steps import Bound, Context, Tally, by_document, run_steps, step, table_of
from megabagel.curation.web import is_sound
from megabagel.data.documents import SampleError
from megabagel.data.formats.samples import caption_text
from megabagel.errors import UserError

STAMPS = Path("/usr/share/tuxpaint/stamps")
LONGEST_SIDE = 512
DPI = 96
"""Of SVG files that give their size in millimetres or points."""
SAMPLES_PER_SHARD = 500


def main(words: list[str] | None = None) -> int:
    """Build the shards and print the report."""
    parser = argparse.ArgumentParser(description="Turn the installed stamps of Tux Paint into WebDataset shards.")
    parser.add_argument("--out", type=Path, default=Path("runs/stamps"), help="where shards go (default: %(default)s)")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="the package's folder (default: %(default)s)")
    arguments = parser.parse_args(words)
    try:
        shards, report = build(arguments.stamps, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report, "", *(f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in shards), sep="\n")
    return 0


def build(stamps: Path, out: Path) -> tuple[list[Path], str]:
    """Write every usable stamp under `stamps` into `out/stamps-000000.tar`, ...; return their paths and the report.

    Raises:
        UserError: the package is not installed, no stamp is usable, or `out` cannot be used.
    """
    paths = [path for path in sorted(stamps.rglob("*")) if path.suffix == ".png" or _only_svg(path)]
    if not paths:
        raise UserError(f"{stamps}: no stamps there. Install them: apt-get install tuxpaint-stamps-default")
    drafts = (load(number, path, stamps) for number, path in enumerate(paths))
    tallies = [Tally(bound.step.name) for bound in STEPS]
    samples = [captioned(pair) for pair in run_steps(drafts, STEPS, tallies)]
    report = table_of(tallies)
    if not samples:
        raise UserError(f"{stamps}: no stamp is left after the filters.\n{report}")
    return write_corpus(out, {"stamps": samples}, SAMPLES_PER_SHARD), report


def load(number: int, path: Path, root: Path) -> Draft:
    """One stamp: its English caption, if it has one, and its picture."""
    data = path.read_bytes() if path.suffix == ".png" else draw(path)
    picture = Picture(str(path.relative_to(root)), data)
    return Draft(f"{number:06d}-{plain_key(path.stem)}", (*caption(path.with_suffix(".txt")), picture))


def caption(path: Path) -> list[Text]:
    """Line 1 is the English caption, with a leading "=" in some versions; the others are "language.utf8=..."."""
    try:
        return [Text(caption_text(path.read_bytes().split(b"\n")[0].removeprefix(b"=")))]
    except (FileNotFoundError, SampleError):
        return []


def draw(path: Path) -> bytes | None:
    """An SVG as a PNG file of LONGEST_SIDE pixels; None if it cannot be drawn, or nothing is drawn."""
    if util.find_spec("resvg_py") is None:
        return None
    import resvg_py

    try:
        sketch = resvg_py.svg_to_bytes(svg_path=str(path), dpi=DPI, skip_system_fonts=True)
        width, height = Image.open(io.BytesIO(sketch)).size
        side = {"width": LONGEST_SIDE} if width >= height else {"height": LONGEST_SIDE}
        png = resvg_py.svg_to_bytes(svg_path=str(path), dpi=DPI, **side)
    except ValueError:
        return None
    return None if Image.open(io.BytesIO(png)).getchannel("A").getextrema()[1] == 0 else png


@by_document
def missing_captions(pair: Draft) -> str | None:
    """A picture needs a caption in UTF-8."""
    return None if pair.text else "no caption"


@by_document
def undrawn_SVGs(pair: Draft) -> str | None:
    """A drawing must have been drawn."""
    return "not drawn" if pair.pictures[0].data is None else None


@by_document
def damaged_stamps(pair: Draft) -> str | None:
    """The whole image must decode."""
    return None if is_sound(pair.pictures[0]) else "damaged"


@step
def repeated_pairs(pairs: Iterable[Draft], context: Context) -> Iterator[Draft]:
    """Of pairs of equal caption and picture the first stays; all stamps are read by one process."""
    seen = set()
    for pair in pairs:
        content = (pair.text, pair.pictures[0].data)
        if content in seen:
            context.drop(pair, "repeated")
        else:
            seen.add(content)
            yield pair


STEPS = (
    Bound(missing_captions),
    Bound(undrawn_SVGs),
    Bound(replace(damaged_stamps, name="damaged_files")),
    Bound(repeated_pairs),
)


def _only_svg(path: Path) -> bool:
    return path.suffix == ".svg" and not path.with_suffix(".png").exists()


if __name__ == "__main__":
    sys.exit(main())
