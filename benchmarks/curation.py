"""Cost of curation: pictures per CPU second of the pool beside a plain loop over the same steps, and memory over time.

    python benchmarks/curation.py [--pages 200] [--workers 1 2] [--documents 10000]

Ratios are within one run on one machine. `--documents` passes that many small documents through one worker and compares
its memory after a tenth of them with that at the end.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabagel.curation.output import Job
from megabagel.curation.read.reader import Seen, reader_of
from megabagel.curation.recipe import Recipe, all_steps, checked
from megabagel.curation.run import curate
from megabagel.curation.steps import Bound, Tally, run_steps
from megabagel.curation.worker import work
from tests.support.curation_pages import SENTENCE, site

STEPS = ["missing_files", "damaged_files", "image_sides", "aspect_ratio", "image_clarity", "printed_text", "language"]


def recipe(pages: int = 25) -> Recipe:
    """The recipe that is measured: no step that needs a second pass."""
    return checked({"name": "bench", "read": {"kind": "web", "pages_per_partition": pages}, "steps": STEPS})


def cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def plain_loop(folder: Path) -> float:
    """CPU seconds of reading and filtering in this process, with nothing written."""
    start, about = cpu_seconds(), recipe()
    reader = reader_of("web")
    steps = [Bound(all_steps()[name], options) for name, options in about.steps]
    for partition in reader.find([folder], **reader.options):
        drafts = reader.read(partition, Seen(), **reader.options)
        for _ in run_steps(drafts, steps, [Tally(bound.step.name) for bound in steps]):
            pass
    return cpu_seconds() - start


def pool(folder: Path, out: Path, workers: int) -> tuple[float, float]:
    """CPU and wall seconds of a run."""
    start, begin = cpu_seconds(), time.monotonic()
    curate(recipe(), [folder], out, "local", workers)
    return cpu_seconds() - start, time.monotonic() - begin


def memory(folder: Path, out: Path, documents: int) -> tuple[float, float]:
    """MiB of the largest resident size of one worker after a tenth of the documents, and after all."""
    folder.mkdir()
    for number in range(documents):
        (folder / f"{number}.html").write_text(f"<p>{SENTENCE.format(number) * 20}</p>")
    about, sizes = recipe(documents // 10), []
    for partition in reader_of("web").find([folder], pages_per_partition=documents // 10):
        work(Job(str(out), about, None), partition)
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return sizes[0], sizes[-1]


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--documents", type=int, default=10_000)
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        first, last = memory(root / "small", root / "memory", args.documents)
        print(f"memory over {args.documents} documents: {first:.0f} MiB after a tenth, {last:.0f} MiB at the end")
        pages = site(root / "pages", args.pages)
        pictures = len(list(pages.rglob("*.png")))
        loop = plain_loop(pages)
        print(f"plain loop: {pictures / loop:.0f} pictures per CPU second")
        for workers in args.workers:
            cpu, wall = pool(pages, root / f"out{workers}", workers)
            ratio = f"{cpu / loop:.2f} x the loop's CPU time"
            print(f"pool of {workers}: {pictures / cpu:.0f} pictures per CPU second, {ratio}, {wall:.1f} s")


if __name__ == "__main__":
    main()
