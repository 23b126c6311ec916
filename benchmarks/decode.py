"""From image files to the pixels of both visual branches: engines `host` and `dali` beside the official recipe.

    python benchmarks/decode.py [--images 24] [--rounds 5] [--out FOLDER]

Every rival gets the same files (sides of 512 to 1024 pixels; JPEG of quality 90, PNG) and the same
sizes: the VAE view (512 to 1024, stride 16) and the ViT view (224 to 518, stride 14; docs/bagel.md#image-sizes). The
official recipe is Pillow and the arithmetic of torchvision's ToTensor and Normalize, one decode, two resizes.

Rounds alternate between the rivals, so that all meet the same load of the machine. CPU seconds are those of the whole
process; other programs lengthen wall time, hardly CPU time. Peak memory is that of a process which runs one rival
alone, above what it held after imports and one image. Writes decode.json and decode.md.
"""

import argparse
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megabagel.config.schema import ResizeConfig
from megabagel.data.decode import Request
from megabagel.data.decode.dali import DaliEngine
from megabagel.data.decode.host import HostEngine
from megabagel.data.decode.transforms import resize_target

FORMATS = ("JPEG", "PNG")
RIVALS = ("official", "host", "dali")
VAE, VIT = (ResizeConfig(1024, 512), 16), (ResizeConfig(518, 224), 14)
Engine = Callable[[Sequence[Request]], Sequence[Any]]


def picture(number: int) -> Image.Image:
    """Slow and fast changes with some grain, about as hard to compress as a photograph; sides of 512 to 1024 pixels."""
    draws = np.random.default_rng(number)
    width, height = (int(side) for side in draws.integers(512, 1025, 2))
    levels = draws.normal(0, 3, (height, width, 3))
    for cell, strength in ((64, 0.5), (16, 0.3), (4, 0.15)):
        coarse = draws.integers(0, 256, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
        levels += strength * np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def requests(format: str, count: int) -> list[Request]:
    """Files with the sizes of their two views."""
    made = []
    for number in range(count):
        image, file = picture(number), io.BytesIO()
        image.save(file, format, **({"quality": 90} if format == "JPEG" else {}))
        sizes = [resize_target(*image.size, *branch) for branch in (VAE, VIT)]
        made.append(Request(file.getvalue(), tuple((height, width) for width, height in sizes)))
    return made


def official(threads: int) -> Engine:
    """The recipe of the official data pipeline; with threads, images side by side."""

    def views(request: Request) -> list[torch.Tensor]:
        image = Image.open(io.BytesIO(request.blob)).convert("RGB")
        return [_normalised(image.resize((w, h), Image.Resampling.BICUBIC)) for h, w in request.sizes]

    def run(batch: Sequence[Request]) -> Sequence[Any]:
        if threads == 1:
            return [views(request) for request in batch]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(views, batch))

    return run


def _normalised(image: Image.Image) -> torch.Tensor:
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    return levels.to(torch.float32).div(255).clone().sub_(0.5).div_(0.5)


def engine(name: str, threads: int) -> Engine:
    """A rival by its name."""
    return {"official": official, "host": HostEngine, "dali": lambda n: DaliEngine(threads=n)}[name](threads)


def measured(format: str, threads: int, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Images per CPU second and per second of every rival: medians over the rounds, the first of which only warms."""
    files = requests(format, count)
    engines = {name: engine(name, threads) for name in RIVALS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in RIVALS}
    for _ in range(rounds + 1):
        for name, run in engines.items():
            cpu, wall = time.process_time(), time.perf_counter()
            run(files)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    rates = {}
    for name, pairs in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
        rates[name] = {"per_cpu_second": count / cpu, "per_second": count / wall}
    for name in RIVALS:
        rates[name]["ratio"] = rates[name]["per_cpu_second"] / rates["official"]["per_cpu_second"]
    return rates


def peak(name: str, format: str, count: int) -> float:
    """MiB that a process of its own takes for one call with all files."""
    command = [sys.executable, __file__, "--peak-of", name, format, "--images", str(count)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(name: str, format: str, count: int) -> None:
    files = requests(format, count)
    run = engine(name, 1)
    run(files[:1])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is held now
    before = _resident("VmRSS")
    kept = run(files)
    assert len(kept) == count
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """MiB of this process: now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def report(found: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "# Decoding: images per CPU second, one decode and both views",
        "",
        f"{found['images']} files per format, medians of {found['rounds']} interleaved rounds, {found['machine']}, "
        + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
        + ". The machine was shared with other work: CPU seconds hardly feel that, wall seconds do. `python "
        "benchmarks/decode.py` writes this file; its docstring says what is measured.",
        "",
        "| format | threads | rival | images per CPU second | ratio to official | images per second | peak, MiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        size = f"{row['peak_mib']:.0f}" if "peak_mib" in row else ""
        rates = f"{row['per_cpu_second']:.1f} | {row['ratio']:.2f} | {row['per_second']:.1f}"
        lines.append(f"| {row['format']} | {row['threads']} | {row['rival']} | {rates} | {size} |")
    output = found["output_mib"]
    lines += [
        "",
        "Peak: above imports and one image, for one call with all files and one thread; the views themselves take "
        f"{output:.0f} MiB. Files: "
        + ", ".join(f"{name} {size:.0f} kB" for name, size in found["mean_kb"].items())
        + " on average.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="files per format")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak-of", nargs=2, metavar=("RIVAL", "FORMAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak_of:
        _peak_here(*args.peak_of, args.images)
        return
    rows = []
    for format in FORMATS:
        for threads in (1, 2):
            for rival, rates in measured(format, threads, args.images, args.rounds).items():
                memory = {"peak_mib": peak(rival, format, args.images)} if threads == 1 else {}
                rows.append({"format": format, "threads": threads, "rival": rival, **rates, **memory})
                print(rows[-1], flush=True)
    files = {format: requests(format, args.images) for format in FORMATS}
    sizes = [size for request in files["JPEG"] for size in request.sizes]
    found = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "pillow", "nvidia-dali-cuda130")},
        "images": args.images,
        "rounds": args.rounds,
        "mean_kb": {name: statistics.mean(len(one.blob) for one in some) / 1000 for name, some in files.items()},
        "output_mib": sum(3 * height * width * 4 for height, width in sizes) / 2**20,
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "decode.md").write_text(report(found))


if __name__ == "__main__":
    main()
