"""Opening an index of a million captioned images: columns beside the same documents as JSON and Python objects.

    python benchmarks/index_load.py [--samples 1000000] [--rounds 3] [--out FOLDER]

`columns` is what a run does: read and check the cache file of every shard, join them, find the samples of the task,
take the fingerprint. `json` is the plain way: one JSON file per shard with a digest in front, made into `Document`
objects. Captions have 87 bytes; a shard holds 1000 samples. Every round is a process of its own; memory is above what
it held after imports. CPU seconds hardly feel other programs on the machine. Writes index_load.json.
"""

import argparse
import hashlib
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from megabagel.data.documents import Document, ImageItem, Member, TextItem
from megabagel.data.index import index_cache
from megabagel.data.index.document_table import TableBuilder, joined
from megabagel.data.index.documents_view import Documents, usable

SHARD = 1000
"""Samples per shard."""


def document(number: int, draws: np.random.Generator) -> Document:
    """A caption and an image of 256 to 1499 pixels a side."""
    text = f"a photograph of thing number {number % 100:2d} on a table beside a window, with evening light on it"
    height, width = (int(side) for side in draws.integers(256, 1500, 2))
    image = ImageItem(height, width, Member(0, number % SHARD * 100_000, 99_000))
    return Document(f"{number:09d}", (TextItem(20, text), image))


def write(folder: Path, samples: int) -> None:
    """Both forms of the index of `samples` samples."""
    draws = np.random.default_rng(0)
    for first in range(0, samples, SHARD):
        shard = folder / f"{first // SHARD:06d}.tar"
        shard.touch()
        documents = [document(number, draws) for number in range(first, first + SHARD)]
        builder = TableBuilder()
        for one in documents:
            builder.add(one.key, one.items, (0, 0))
        scan = index_cache.Scan(builder.table(), (), index_cache.State.of(shard))
        index_cache.save(index_cache.file_of(shard, None, {}), scan)
        rows = [[one.key, [[type(item).__name__[0], *astuple(item)] for item in one.items]] for one in documents]
        body = json.dumps(rows, separators=(",", ":")).encode()
        shard.with_suffix(".json").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def open_columns(folder: Path) -> Any:
    """The index as a run opens it."""
    shards = sorted(folder.glob("*.tar"))
    scans = (index_cache.load(index_cache.file_of(shard, None, {}), shard) for shard in shards)
    table = joined([scan.table for scan in scans if scan])
    documents = Documents(table, usable(table, "t2i")[0], "t2i", "bytes")
    documents.fingerprint()
    return documents


def open_json(folder: Path) -> Any:
    """The same documents as objects."""
    documents = []
    for path in sorted(folder.glob("*.json")):
        digest, body = path.read_bytes().split(b"\n", 1)
        assert hashlib.sha256(body).hexdigest().encode() == digest
        for key, (text, image) in json.loads(body):
            image = ImageItem(image[1], image[2], Member(*image[3]), *image[4:])
            documents.append(Document(key, (TextItem(*text[1:]), image)))
    return documents


RIVALS: dict[str, Callable[[Path], Any]] = {"columns": open_columns, "json": open_json}


def _here(rival: str, folder: Path) -> None:
    """Open the index once in this process and print what it took."""
    before = _held()
    start = time.process_time()
    documents = RIVALS[rival](folder)
    seconds = time.process_time() - start
    held, peak = _held() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6 - before
    start = time.process_time()
    assert all(documents[number].key for number in range(0, len(documents), 10))
    per_second = len(documents) / 10 / (time.process_time() - start)
    print(json.dumps({"cpu_s": seconds, "held_mb": held, "peak_mb": peak, "documents_per_s": per_second}))


def _held() -> float:
    """Resident memory of this process, MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _size(folder: Path, rival: str) -> float:
    files = folder.glob(".index/*") if rival == "columns" else folder.glob("*.json")
    return sum(file.stat().st_size for file in files) / 1e6


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--open", nargs=2, metavar=("RIVAL", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        _here(args.open[0], Path(args.open[1]))
        return
    found: dict[str, Any] = {"samples": args.samples, "python": platform.python_version(), "rivals": {}}
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), args.samples)
        rounds: dict[str, list[dict[str, float]]] = {rival: [] for rival in RIVALS}
        for _ in range(args.rounds):
            for rival in RIVALS:
                command = [sys.executable, __file__, "--open", rival, name]
                rounds[rival].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        for rival, results in rounds.items():
            medians = {key: round(statistics.median(result[key] for result in results), 2) for key in results[0]}
            found["rivals"][rival] = medians | {"disk_mb": round(_size(Path(name), rival), 1)}
    columns, plain = found["rivals"]["columns"], found["rivals"]["json"]
    found["json_over_columns"] = {
        key: round(plain[key] / columns[key], 2) for key in ("cpu_s", "held_mb", "peak_mb", "disk_mb")
    }
    print(json.dumps(found, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "index_load.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
