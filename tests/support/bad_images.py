"""A corpus of odd and bad image files, made here byte by byte, and what every engine makes of each.

    python -m tests.support.bad_images          writes the table in docs/data.md
    python -m tests.support.bad_images --json   prints the outcomes; the tests run it so, in a process of its own

Files differ from a sound one in one thing each; the name says which.
"""

import argparse
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms

from megabagel.data.decode import DecodeError, Request, choose_engine, measure
from megabagel.data.decode.dali import DaliEngine
from megabagel.data.decode.headers import open_image
from megabagel.data.decode.transforms import to_rgb
from tests.support.pictures import file_of, grey16, noise, turned

DOCUMENT = Path(__file__).parents[2] / "docs" / "data.md"
MARKERS = ("<!-- bad-images -->\n", "<!-- /bad-images -->")
VIEW = (28, 42)
WIDTH, HEIGHT = 48, 32


def smooth(width: int = WIDTH, height: int = HEIGHT, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """An image with slow changes, as photographs have: JPEG keeps it well."""
    return noise(-(-width // 8), -(-height // 8), mode, seed).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    """A JPEG file."""
    return file_of(image or smooth(), "JPEG", **options)


def chunk(kind: bytes, data: bytes, crc: int = 0) -> bytes:
    """A PNG chunk; `crc` spoils its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ crc)


def png(
    rows: np.ndarray, depth: int, colour: int, before: bytes = b"", after: bytes = b"", interlace: bool = False
) -> bytes:
    """A PNG of raw rows [height, bytes per row], or of whole bytes per pixel [height, width, bytes] in Adam7 order."""
    height = len(rows)
    width = rows.shape[1] if rows.ndim == 3 else rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [rows[top::down, left::right] for top, left, down, right in passes] if interlace else [rows]
    raw = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + before + chunk(b"IDAT", zlib.compress(raw)) + after + chunk(b"IEND", b"")


def levels(height: int, width: int) -> np.ndarray:
    """Random bytes [height, width]."""
    return np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """The file with some bytes replaced."""
    return data[:at] + new + data[at + len(new) :]


def frame_header(data: bytes, height: int, width: int, precision: int = 8) -> bytes:
    """A JPEG that claims another size or depth."""
    return patched(data, data.index(b"\xff\xc0") + 4, struct.pack(">BHH", precision, height, width))


def frames(format: str, mode: str = "RGB", **options: Any) -> bytes:
    """Three pictures in one file."""
    first, *others = (smooth(mode=mode, seed=seed) for seed in range(3))
    return file_of(first, format, save_all=True, append_images=others, **options)


def with_orientation_in_xmp() -> bytes:
    """A JPEG whose orientation stands in XMP alone."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    return jpeg(xmp=xmp)


EXIF = Image.Exif()
EXIF[0x0112] = 6
TURN = EXIF.tobytes().removeprefix(b"Exif\0\0")
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
JPEG, PNG, RGB = jpeg(), file_of(smooth()), levels(HEIGHT, 3 * WIDTH)
NOISE = jpeg(noise(WIDTH, HEIGHT))
"""A JPEG of which most bytes are pixels."""

JPEG_FILES: dict[str, Callable[[], bytes]] = {
    "baseline.jpg": lambda: JPEG,
    "progressive.jpg": lambda: jpeg(progressive=True),
    "no-subsampling.jpg": lambda: jpeg(subsampling=0),
    "odd-size-subsampled.jpg": lambda: jpeg(smooth(37, 23)),
    "restart-markers.jpg": lambda: jpeg(restart_marker_blocks=2),
    "stored-as-rgb.jpg": lambda: jpeg(keep_rgb=True),
    "grey.jpg": lambda: jpeg(smooth(mode="L")),
    "cmyk.jpg": lambda: jpeg(smooth(mode="CMYK")),
    **{f"turned-{number}.jpg": (lambda number=number: turned(number, smooth(), "JPEG")) for number in range(2, 10)},
    "turned-by-xmp.jpg": with_orientation_in_xmp,
    "garbage-exif.jpg": lambda: jpeg(exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
    "lab-profile.jpg": lambda: jpeg(icc_profile=LAB),
    "garbage-profile.jpg": lambda: jpeg(icc_profile=b"nothing"),
    "two-pictures.mpo": lambda: frames("MPO"),
    "long-comment.jpg": lambda: jpeg(comment=b"x" * 60_000),
    "bytes-after-the-end.jpg": lambda: JPEG + b"\0" * 999,
    "two-files-in-one.jpg": lambda: JPEG + jpeg(smooth(seed=1)),
    "bytes-before-the-start.jpg": lambda: b"\0\0" + JPEG,
    "no-end-mark.jpg": lambda: JPEG[:-2],
    "half.jpg": lambda: NOISE[: len(NOISE) // 2],
    "last-bytes-missing.jpg": lambda: NOISE[:-40],
    "header-only.jpg": lambda: JPEG[: JPEG.index(b"\xff\xda")],
    "two-bytes.jpg": lambda: JPEG[:2],
    "damaged-pixels.jpg": lambda: patched(NOISE, len(NOISE) - 300, b"\x5a" * 100),
    "marker-among-pixels.jpg": lambda: patched(NOISE, len(NOISE) - 300, b"\xff\xd9"),
    "damaged-tables.jpg": lambda: patched(JPEG, JPEG.index(b"\xff\xc4") + 5, b"\xff" * 16),
    "claims-65500-squared.jpg": lambda: frame_header(JPEG, 65500, 65500),
    "claims-more-rows.jpg": lambda: frame_header(JPEG, 10 * HEIGHT, WIDTH),
    "no-rows.jpg": lambda: frame_header(JPEG, 0, WIDTH),
    "12-bit.jpg": lambda: frame_header(JPEG, HEIGHT, WIDTH, precision=12),
}

PNG_FILES: dict[str, Callable[[], bytes]] = {
    "rgb.png": lambda: PNG,
    "grey.png": lambda: file_of(smooth(mode="L")),
    "rgba.png": lambda: file_of(smooth(mode="RGBA")),
    "grey-alpha.png": lambda: file_of(smooth(mode="LA")),
    "palette.png": lambda: file_of(smooth().quantize(16)),
    "palette-clear.png": lambda: file_of(smooth().quantize(16), transparency=3),
    "rgb-with-a-clear-colour.png": lambda: png(RGB, 8, 2, chunk(b"tRNS", bytes([0, RGB[0, 0], 0, RGB[0, 1], 0, 9]))),
    "grey-with-a-clear-level.png": lambda: png(levels(32, 48), 8, 0, chunk(b"tRNS", b"\0\x40")),
    **{f"grey-{n}-bit.png": (lambda n=n: png(levels(32, 6 * n), n, 0)) for n in (1, 2, 4)},
    "palette-1-bit.png": lambda: png(levels(32, 6), 1, 3, chunk(b"PLTE", b"\x20\x40\x60\xf0\xc0\x10")),
    "palette-too-short.png": lambda: png(levels(32, 24), 4, 3, chunk(b"PLTE", b"\x20\x40\x60\xf0\xc0\x10")),
    "grey-16-bit.png": lambda: grey16(48, 32),
    "rgb-16-bit.png": lambda: png(levels(32, 6 * 48), 16, 2),
    "rgba-16-bit.png": lambda: png(levels(32, 8 * 48), 16, 6),
    "interlaced.png": lambda: png(levels(32, 3 * 48).reshape(32, 48, 3), 8, 2, interlace=True),
    "animated.png": lambda: frames("PNG"),
    "turned.png": lambda: turned(6, smooth()),
    "turned-after-pixels.png": lambda: png(RGB, 8, 2, after=chunk(b"eXIf", TURN)),
    "lab-profile.png": lambda: file_of(smooth(), icc_profile=LAB),
    "gamma.png": lambda: png(RGB, 8, 2, chunk(b"gAMA", struct.pack(">I", 100_000))),
    "wrong-sum-of-a-note.png": lambda: png(RGB, 8, 2, chunk(b"tIME", bytes(7), crc=1)),
    "wrong-sum-of-the-header.png": lambda: patched(PNG, 29, b"\0\0\0\0"),
    "wrong-sum-of-pixels.png": lambda: patched(PNG, len(PNG) - 16, b"\0\0\0\0"),
    "damaged-pixels.png": lambda: patched(PNG, len(PNG) // 2, b"\xaa\x55"),
    "half.png": lambda: PNG[: len(PNG) // 2],
    "no-end-mark.png": lambda: PNG[:-12],
    "header-only.png": lambda: PNG[:33],
    "rows-missing.png": lambda: patched(png(RGB[:20], 8, 2), 16, PNG[16:33]),
    "no-columns.png": lambda: png(np.zeros((32, 0), np.uint8), 8, 2),
    "claims-2-to-the-31.png": lambda: patched(
        PNG, 8, chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    ),
    "note-that-unpacks-to-64-MiB.png": lambda: png(
        RGB, 8, 2, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(2**26), 9))
    ),
}

OTHER_FILES: dict[str, Callable[[], bytes]] = {
    "lossy.webp": lambda: file_of(smooth(), "WEBP"),
    "lossless.webp": lambda: file_of(smooth(), "WEBP", lossless=True),
    "alpha.webp": lambda: file_of(smooth(mode="RGBA"), "WEBP"),
    "animated.webp": lambda: frames("WEBP"),
    "turned.webp": lambda: file_of(smooth(), "WEBP", exif=EXIF.tobytes()),
    "half.webp": lambda: file_of(noise(WIDTH, HEIGHT), "WEBP")[:1000],
    "plain.gif": lambda: file_of(smooth(), "GIF"),
    "clear.gif": lambda: file_of(smooth().quantize(16), "GIF", transparency=2),
    "animated.gif": lambda: frames("GIF"),
    "half.gif": lambda: file_of(noise(WIDTH, HEIGHT), "GIF")[:1000],
    "no-frame.gif": lambda: b"GIF89a" + struct.pack("<HHBBB", WIDTH, HEIGHT, 0, 0, 0) + b";",
    "plain.avif": lambda: file_of(smooth(), "AVIF"),
    "alpha.avif": lambda: file_of(smooth(mode="RGBA"), "AVIF"),
    "half.avif": lambda: file_of(noise(WIDTH, HEIGHT), "AVIF")[:600],
    "plain.jp2": lambda: file_of(smooth(), "JPEG2000"),
    "alpha.jp2": lambda: file_of(smooth(mode="RGBA"), "JPEG2000"),
    "half.jp2": lambda: file_of(noise(WIDTH, HEIGHT), "JPEG2000")[:1500],
    "plain.tif": lambda: file_of(smooth(), "TIFF"),
    "packed.tif": lambda: file_of(smooth(), "TIFF", compression="tiff_lzw"),
    "pages.tif": lambda: frames("TIFF"),
    "cmyk.tif": lambda: file_of(smooth(mode="CMYK"), "TIFF"),
    "grey-16-bit.tif": lambda: file_of(Image.open(io.BytesIO(grey16(48, 32))), "TIFF"),
    "grey-32-bit.tif": lambda: file_of(Image.fromarray(np.arange(48, dtype=np.int32)[None].repeat(32, 0)), "TIFF"),
    "floats.tif": lambda: file_of(Image.fromarray(np.ones((HEIGHT, WIDTH), np.float32)), "TIFF"),
    "half.tif": lambda: file_of(smooth(), "TIFF")[:2000],
    "plain.bmp": lambda: file_of(smooth(), "BMP"),
    "half.bmp": lambda: file_of(smooth(), "BMP")[:2000],
    "plain.ppm": lambda: file_of(smooth(), "PPM"),
    "grey-16-bit.pgm": lambda: b"P5 48 32 65535\n" + levels(32, 96).tobytes(),
    "one-pixel.jpg": lambda: jpeg(noise(1, 1)),
    "one-pixel.png": lambda: file_of(noise(1, 1)),
    "200-to-1.png": lambda: file_of(noise(400, 2)),
    "201-to-1.png": lambda: file_of(noise(402, 2)),
    "201-to-1.jpg": lambda: jpeg(noise(1, 201)),
    "24-megapixels.jpg": lambda: jpeg(smooth(6000, 4000)),
    "a-jpeg-called.png": lambda: JPEG,
    "a-png-called.jpg": lambda: PNG,
    "zero-bytes.jpg": lambda: b"",
    "one-byte.jpg": lambda: b"\xff",
    "zeros.png": lambda: bytes(5000),
    "page.html.jpg": lambda: b"<!doctype html><title>404</title>Not found",
    "drawing.svg": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "postscript.png": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "icon.ico": lambda: file_of(smooth(32, 32), "ICO"),
    "film.mp4.jpg": lambda: b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(200),
}

FILES = {**JPEG_FILES, **PNG_FILES, **OTHER_FILES}


def outcomes() -> dict[str, dict[str, Any]]:
    """Per file: what `measure` and both engines say, who decoded for dali, and the largest difference in levels."""
    host, found = choose_engine("host"), {}
    for name, make in FILES.items():
        data = make()
        dali = choose_engine("dali")
        assert isinstance(dali, DaliEngine)
        request = Request(data, (VIEW, _own_size(data)))
        (by_host,), (by_dali,) = host([request]), dali([request])
        by = next(iter(dali.by_host), "DALI") if not isinstance(by_dali, DecodeError) or dali.by_host else "header"
        found[name] = {"host": _said(by_host), "dali": _said(by_dali), "by": by, "measured": _measured(data)}
        if isinstance(by_host, list) and isinstance(by_dali, list):
            pairs = zip(by_host, by_dali, strict=True)
            found[name]["levels"] = [round(float((a - b).abs().max()) * 127.5) for a, b in pairs]
    return found


def together() -> list[bool]:
    """Whether each file meets the same outcome among all others as alone."""
    requests = [Request(make(), (VIEW,)) for make in FILES.values()]
    dali = choose_engine("dali")
    alone = [outcome for request in requests for outcome in dali([request])]
    return [_same(one, other) for one, other in zip(alone, dali(requests), strict=True)]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, DecodeError) or isinstance(other, DecodeError):
        return str(one) == str(other)
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _own_size(data: bytes) -> tuple[int, int]:
    try:
        width, height = to_rgb(open_image(data)).size
    except Exception:
        return VIEW
    return (height, width) if width * height < 1e6 else VIEW


def _said(outcome: Any) -> str:
    return outcome.reason if isinstance(outcome, DecodeError) else "x".join(str(n) for n in outcome[1].shape[1:])


def _measured(data: bytes) -> list[str]:
    """Height x width, or the reason, with the pixels decoded and without."""
    said = []
    for verify in (True, False):
        try:
            said.append("{}x{}".format(*measure(data, verify=verify)))
        except DecodeError as error:
            said.append(error.reason)
    return said


def table(found: dict[str, dict[str, Any]]) -> str:
    """The outcomes as docs/data.md shows them."""
    lines = ["| file | height x width, or why not | decoded for `dali` by | largest difference, levels |"]
    lines += ["| --- | --- | --- | --- |"]
    for name, row in found.items():
        shown = row["measured"][0] if row["host"] == row["dali"] else f"host: {row['host']}; dali: {row['dali']}"
        by = "DALI" if row["by"] == "DALI" else f"host ({row['by']})" if row["by"] != "header" else "nobody (header)"
        lines.append(f"| `{name}` | {shown} | {by} | {max(row['levels']) if 'levels' in row else ''} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the outcomes, or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    if parser.parse_args().json:
        json.dump({"files": outcomes(), "together": together()}, sys.stdout)
        return
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(MARKERS[0])
    _, mark, tail = rest.partition(MARKERS[1])
    DOCUMENT.write_text(f"{head}{MARKERS[0]}{table(outcomes())}{mark}{tail}")


if __name__ == "__main__":
    main()
