"""Measure the normalising constants of codec `blocks` (MEAN and STD in megabagel/model/vae_blocks.py).

    python tools/measure_blocks.py SOURCE [SOURCE ...] [--max-side 256]

A source is a folder of images (searched recursively), a tar shard or a single image. Sources weigh the same whatever
their size: the second source does not count less for having fewer pictures. Prints the two literals and, per source,
how many images were read and skipped. About 7 s per 1,000 images on one core.
"""

import argparse
import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megabagel.model.vae_blocks import BLOCK, BlockCodec

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def image_bytes(source: Path) -> Iterator[bytes]:
    """Contents of every image file under a folder or inside a tar, in name order; or of one image file."""
    if source.suffix == ".tar":
        with tarfile.open(source) as shard:
            for member in shard:
                file = shard.extractfile(member) if Path(member.name).suffix.lower() in SUFFIXES else None
                if file is not None:
                    yield file.read()
        return
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    yield from (file.read_bytes() for file in files if file.suffix.lower() in SUFFIXES)


def pixels(image: Image.Image, max_side: int) -> Tensor:
    """Image on white, at most `max_side` pixels a side, cut to whole blocks: [1, 3, h, w] in [-1, 1]."""
    layer = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    flat.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
    width, height = (side - side % BLOCK for side in flat.size)
    if min(width, height) == 0:
        raise ValueError("smaller than a block")
    array_hw3 = np.array(flat.crop((0, 0, width, height)), dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array_hw3).permute(2, 0, 1)[None]


def moments(source: Path, max_side: int) -> tuple[Tensor, Tensor]:
    """Mean [16] and mean square [16] of the coefficients over all blocks of one source."""
    codec, read, skipped = BlockCodec(), 0, 0
    blocks, total, squares = 0, torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for content in image_bytes(source):
        try:
            coefficients = codec.coefficients(pixels(Image.open(io.BytesIO(content)), max_side))
        except (OSError, ValueError, SyntaxError):  # Pillow reports a broken PNG as a SyntaxError
            skipped += 1
            continue
        read += 1
        blocks += coefficients[0, 0].numel()
        total += coefficients.sum(dim=(0, 2, 3))
        squares += coefficients.square().sum(dim=(0, 2, 3))
    print(f"{source}: {read} images, {blocks} blocks, {skipped} skipped", file=sys.stderr)
    if blocks == 0:
        raise SystemExit(
            f"{source}: no readable image; expected a folder, a .tar shard or a file of {sorted(SUFFIXES)}"
        )
    return total / blocks, squares / blocks


def main() -> None:
    """Print MEAN and STD over the equal mix of the sources."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--max-side", type=int, default=256, help="images are shrunk to this many pixels a side")
    arguments = parser.parse_args()
    measured = [moments(source, arguments.max_side) for source in arguments.sources]
    mean, square = (torch.stack(part).mean(dim=0) for part in zip(*measured, strict=True))
    for name, values in (("MEAN", mean), ("STD", (square - mean.square()).sqrt())):
        print(f"{name} = ({', '.join(f'{value:.4f}' for value in values.tolist())})")


if __name__ == "__main__":
    main()
