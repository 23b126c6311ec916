"""`megabagel parity` run inside warm worker processes, and altered copies of the golden cases to run it on.

ranks.run(2, parity, ["cases/train_04_edit", "parallel.tp=2"])     # what each rank of two printed and returned
"""

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.parity_files import at_hand, stem

TRAIN = (
    "train_01_text_only",
    "train_02_t2i",
    "train_03_vlm",
    "train_04_edit",
    "train_05_interleave3",
    "train_06_video_groups",
)
TEXT_ONLY, EDIT = TRAIN[0], TRAIN[3]
TRAIN_AT_HAND = at_hand(*TRAIN)
PRIM = ("prim_01_building_blocks", "prim_02_tiny_vae")
DP2, ACCUMULATED, ACCUMULATED_GLOBAL = "trace_01_dp2", "trace_02_accum2", "trace_03_accum2_global"
INFER = "infer_08_text_turns"
DRAWING = "infer_01_vqa_and_t2i"
INFERENCE = (
    DRAWING,
    "infer_03_renorm",
    "infer_05_schedule_and_sizes",
    "infer_06_two_images",
    INFER,
    "infer_09_kv_cache",
    "infer_10_pixels_to_pixels",
    "infer_12_taylorseer",
    "infer_13a_dense",
    "infer_14_sampled_text",
)
"""Generation; others are kept back."""
MICRO_STEP = "train.loss_normalization=micro_step"
"""The official rule for accumulation, by which `trace_02` was computed."""


@dataclass(frozen=True)
class Outcome:
    """What one rank of the command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def failed(self) -> list[str]:
        """Names of the rows that fail, and of the worst in a group of them; columns of numbers left out."""
        cells = [re.split(r"\s{2,}", line) for line in self.out.splitlines()]
        return [" ".join((row[0], *row[row.index("FAIL") + 1 :])) for row in cells if "FAIL" in row]


Plant = Callable[[pytest.MonkeyPatch], None]


def paths(*names: str) -> list[str]:
    """Cases as words of the command line."""
    return [str(stem(name)) for name in names]


def parity(words: Sequence[str], plant: Plant | None = None) -> Outcome:
    """`megabagel parity WORDS` as this worker's rank of the process group at hand, with an error planted."""
    from megabagel.cli import main
    from megabagel.parity import run

    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(run, "joined", _joined_already)
        if plant:
            plant(patch)
        code = main(["parity", *words])
    return Outcome(code, out.getvalue(), err.getvalue())


@contextmanager
def _joined_already() -> Iterator[Any]:
    """In place of `mesh.joined`: the pool has set up the process group."""
    import torch.distributed as dist

    from megabagel.parallel.mesh import Axis

    yield Axis(dist.get_rank(), dist.get_world_size(), dist.group.WORLD)


Entries = dict[str, Tensor]
About = dict[str, Any]
Change = Callable[[Entries, About], object]


def changed(name: str, folder: Path, change: Change) -> str:
    """Path of a copy in `folder` of a case whose entries and JSON content were handed to `change`."""
    source = stem(name)
    entries, about = load_file(f"{source}.safetensors"), json.loads(Path(f"{source}.json").read_text())
    change(entries, about)
    return written(folder / name, entries, about)


def written(stem: Path, entries: Entries, about: About) -> str:
    """Write a case; its path."""
    save_file(entries, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps(about))
    return str(stem)


def without_weights(entries: Entries, about: About) -> None:
    """Leave what a case for speed carries: its batch, its config and how it was packed."""
    for key in [key for key in entries if not key.startswith("batch/")]:
        del entries[key]
    for key in about.keys() - {"config", "samples", "dropout", "dropout_draws"}:
        del about[key]
