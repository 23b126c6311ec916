"""Description of a checkpoint, and differences between two; read in pieces and without ranks."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megabagel.checkpoint.index import NAMES
from megabagel.checkpoint.reader import Stored
from megabagel.errors import printable


def describe(folder: Path) -> dict[str, Any]:
    """Return step, grid, versions, and shape, type and bytes of every tensor, as JSON values. Raises UserError."""
    stored = Stored(folder)
    about = stored.manifest
    tensors = {
        key: {
            "shape": list(entry.shape),
            "dtype": NAMES[entry.dtype],
            "bytes": prod(entry.shape) * entry.dtype.itemsize,
            "boxes": len(entry.boxes),
            "files": len({box.file for box in entry.boxes}),
        }
        for key, entry in sorted(stored.index.items())
    }
    return {
        "folder": str(folder),
        "step": about.step,
        "grid": about.grid,
        "seed": about.seed,
        "ema": about.ema,
        "freeze": list(about.freeze),
        "versions": about.versions,
        "files": {name: sums.size for name, sums in about.files.items()},
        "tensors": tensors,
    }


def as_text(about: dict[str, Any]) -> str:
    """Format a description for people."""
    grid = " x ".join(f"{axis} {size}" for axis, size in about["grid"].items()) or "imported"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [f"{about['folder']}", f"step      {about['step']:,}", f"grid      {grid}", f"versions  {versions}"]
    lines += [f"ema       {about['ema'] or 'none'}", f"frozen    {', '.join(about['freeze']) or 'nothing'}"]
    kinds: dict[str, list[int]] = defaultdict(list)
    for key, tensor in about["tensors"].items():
        kinds[key.partition("/")[0]].append(tensor["bytes"])
    lines += [f"{kind:<9} {len(sizes):,} tensors, {sum(sizes):,} bytes" for kind, sizes in kinds.items()]
    lines += [f"files     {len(about['files']):,}, {sum(about['files'].values()):,} bytes", ""]
    width = max(map(len, about["tensors"]))
    lines += [
        f"{key:<{width}}  {tensor['dtype']:<4}  {' x '.join(map(str, tensor['shape'])):<16}"
        f"  {tensor['bytes']:>14,} bytes  {tensor['boxes']} {'box' if tensor['boxes'] == 1 else 'boxes'}"
        for key, tensor in about["tensors"].items()
    ]
    return printable("\n".join(lines), keep="\n")


@dataclass(frozen=True)
class Difference:
    """Difference of one tensor between two checkpoints."""

    key: str
    what: str
    """`absent` from one of them, other `shape`, other `type`, or other `numbers`."""
    count: int = 0
    """Elements whose bits differ."""
    absolute: float = 0.0
    """Largest difference; infinite where one is no finite number and the other has other bits."""
    relative: float = 0.0
    """Largest difference over the larger of the two magnitudes."""


def differences(one: Path, other: Path) -> Iterator[Difference]:
    """Yield every tensor in which two checkpoints differ bit by bit, whatever grids wrote them. Raises UserError."""
    mine, theirs = Stored(one), Stored(other)
    for key in sorted(mine.index.keys() | theirs.index.keys()):
        if key not in mine or key not in theirs:
            yield Difference(key, f"absent from {one if key not in mine else other}")
        elif mine.shape(key) != theirs.shape(key):
            yield Difference(key, f"shape {list(mine.shape(key))} and {list(theirs.shape(key))}")
        elif mine.dtype(key) != theirs.dtype(key):
            yield Difference(key, f"type {NAMES[mine.dtype(key)]} and {NAMES[theirs.dtype(key)]}")
        elif (found := _numbers(key, mine, theirs)).count:
            yield found


def _numbers(key: str, mine: Stored, theirs: Stored) -> Difference:
    """Compare the elements of a tensor, piece by piece."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[mine.dtype(key).itemsize]
    count, absolute, relative = 0, 0.0, 0.0
    for a, b in zip(mine.whole(key).read(), theirs.whole(key).read(), strict=True):
        differ = a.view(bits) != b.view(bits)
        if differ.any():
            x, y = a[differ].double(), b[differ].double()
            gap = (x - y).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
            share = (gap / torch.maximum(x.abs(), y.abs())).nan_to_num(nan=torch.inf, posinf=torch.inf)
            share[gap == 0] = 0  # 0 and -0
            count += int(differ.sum())
            absolute, relative = max(absolute, float(gap.max())), max(relative, float(share.max()))
    return Difference(key, "numbers", count, absolute, relative)
