"""Turn the stamps of Debian's package tuxpaint-stamps-default into shards: real photographs and drawings with captions.

    apt-get install tuxpaint-stamps-default      # about 950 captioned images
    pip install -e ".[svg]"                      # optional: without it the stamps that exist as SVG only are skipped
    python tools/build_stamps.py --out runs/stamps

The caption is the English one. PNG files stay as they are; an SVG is drawn at 512 pixels on its longest side, unless a
PNG of the same name exists. Takes about half a minute.
"""

import argparse
import io
import sys
from importlib import util
from pathlib import Path

from PIL import Image

from megabagel.data.documents import SampleError
from megabagel.data.prepare import Picture, Report, pack
from megabagel.data.samples import caption_text
from megabagel.errors import UserError

STAMPS = Path("/usr/share/tuxpaint/stamps")
LONGEST_SIDE = 512
DPI = 96
"""Of SVG files that give their size in millimetres or points."""


def main() -> int:
    """Build the shards and print the report."""
    parser = argparse.ArgumentParser(description="Turn the installed stamps of Tux Paint into WebDataset shards.")
    parser.add_argument("--out", type=Path, default=Path("runs/stamps"), help="where shards go (default: %(default)s)")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="the package's folder (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(build(arguments.stamps, arguments.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(stamps: Path, out: Path) -> Report:
    """Pack every stamp under `stamps` into `out/stamps-000000.tar`, ...

    Raises:
        UserError: the package is not installed, or `out` cannot be used.
    """
    paths = sorted(path for path in stamps.rglob("*") if path.suffix in (".png", ".svg"))
    if not paths:
        raise UserError(f"{stamps}: no stamps there. Install them: apt-get install tuxpaint-stamps-default")
    return pack(paths, stamps, load, out, samples_per_shard=500, name="stamps")


def load(path: Path) -> Picture:
    """One stamp with its English caption; SampleError if it has none or cannot be drawn."""
    if path.suffix == ".svg" and path.with_suffix(".png").exists():
        raise SampleError("SVG whose PNG is used")
    try:
        # Line 1 is the English caption, with a leading "=" in some versions; the others are "language.utf8=...".
        first = path.with_suffix(".txt").read_bytes().split(b"\n")[0]
    except FileNotFoundError as error:
        raise SampleError("no caption") from error
    caption = caption_text(first.removeprefix(b"="))
    return Picture(path.read_bytes() if path.suffix == ".png" else draw(path), "png", caption)


def draw(path: Path) -> bytes:
    """An SVG as a PNG file of LONGEST_SIDE pixels."""
    if util.find_spec("resvg_py") is None:
        raise SampleError("SVG, and no resvg-py to draw it")
    import resvg_py

    try:
        sketch = resvg_py.svg_to_bytes(svg_path=str(path), dpi=DPI, skip_system_fonts=True)
        width, height = Image.open(io.BytesIO(sketch)).size
        side = {"width": LONGEST_SIDE} if width >= height else {"height": LONGEST_SIDE}
        png = resvg_py.svg_to_bytes(svg_path=str(path), dpi=DPI, **side)
    except ValueError as error:
        raise SampleError("SVG cannot be drawn", str(error)) from error
    if Image.open(io.BytesIO(png)).getchannel("A").getextrema()[1] == 0:
        raise SampleError("SVG draws nothing")
    return png


if __name__ == "__main__":
    sys.exit(main())
