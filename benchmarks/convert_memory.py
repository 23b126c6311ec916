"""Peak memory of import-hf and export-hf, on a randomly filled file with the widths of BAGEL-7B and few layers.

    python benchmarks/convert_memory.py [--layers 2] [--folder /tmp]

Needs three times the file on disk (2 layers: 4.2 GB each) and removes all of it. Exit code 1 unless the exported file
equals the imported one in every byte and both peaks are at most 2 GiB above the largest tensor.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.runtime import cpu_backend

cpu_backend.install()  # before anything imports megatron

from megabagel.checkpoint.hf.config import llm_json, vit_json  # noqa: E402
from megabagel.checkpoint.hf.folder import LLM_CONFIG, VIT_CONFIG, write_json  # noqa: E402
from megabagel.checkpoint.hf.names import official_shapes, table_sides  # noqa: E402
from megabagel.checkpoint.hf.writer import write_safetensors  # noqa: E402
from megabagel.checkpoint.lazy import LazyTensor, row_ranges  # noqa: E402
from megabagel.model.positions import sincos_table  # noqa: E402

BAGEL_7B = ModelConfig(
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    ffn=18944,
    vocab=152064,
    vit=VitConfig(layers=26, hidden=1152, heads=16, ffn=4304),
)
ALLOWED = 2 << 30
"""Bytes above the largest tensor."""


def main() -> int:
    """Make, import, export, compare; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="of the language model and of the tower")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files for a while")
    args = parser.parse_args()
    vit = replace(BAGEL_7B.vit, layers=args.layers)
    model = replace(BAGEL_7B, layers=args.layers, vit=vit)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        largest = write_published(folder / "published", model)
        peaks = [
            converted("import-hf", folder / "published", folder / "imported"),
            converted("export-hf", folder / "imported", folder / "exported"),
        ]
        before, after = (folder / name / "ema.safetensors" for name in ("published", "exported"))
        equal = filecmp.cmp(before, after, shallow=False)
    print(f"largest tensor {largest / 2**30:.2f} GiB; files equal: {equal}")
    return 0 if equal and max(peaks) <= largest + ALLOWED else 1


def write_published(folder: Path, model: ModelConfig) -> int:
    """A published folder with random bf16 weights and the true position tables; returns bytes of the largest tensor."""
    folder.mkdir()
    write_json(folder / LLM_CONFIG, llm_json(model))
    write_json(folder / VIT_CONFIG, vit_json(model))
    sides = table_sides(model)
    tensors = {
        name: LazyTensor(shape, torch.bfloat16, partial(_numbers, shape, sides.get(name)))
        for name, shape in official_shapes(model).items()
    }
    write_safetensors(folder / "ema.safetensors", tensors)
    size, largest = sum(tensor.nbytes for tensor in tensors.values()), max(tensor.nbytes for tensor in tensors.values())
    print(f"{len(tensors):,} tensors, {model.layers} layers, {size / 2**30:.2f} GiB", flush=True)
    return largest


def _numbers(shape: tuple[int, ...], side: int | None) -> Iterator[torch.Tensor]:
    """A position table, or any bits, infinities and every NaN included: what is only carried must come through."""
    if side is not None:
        yield sincos_table(shape[1], side).bfloat16()
        return
    generator = torch.Generator().manual_seed(shape[0])
    for start, stop in row_ranges(shape, torch.bfloat16):
        bits = torch.randint(-(2**15), 2**15, (stop - start, *shape[1:]), dtype=torch.int16, generator=generator)
        yield bits.view(torch.bfloat16)


def converted(command: str, source: Path, out: Path) -> int:
    """Run a command in a process of its own; returns its peak resident bytes (not below this small process's own)."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "megabagel", command, str(source), str(out)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    print(f"{command}: peak {usage.ru_maxrss / 2**20:.2f} GiB, {time.monotonic() - began:.0f} s", flush=True)
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
