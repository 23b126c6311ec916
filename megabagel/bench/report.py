"""Result of a measurement, as JSON and as a Markdown table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from megabagel.errors import UserError

FORMAT = 1
FORMULAS = """\
TFLOP/s and MFU, in two conventions (docs/architecture.md):

    official = 6 x (parameters of one expert's branch + embedding + head) x tokens
             + 12 x layers x heads x head_dim x sum over samples of tokens^2
    masked   = the same, attention by exactly the visible pairs: 12 x layers x heads x head_dim x pairs
    MFU      = FLOPs / (seconds x ranks x peak of a device)

The ViT tower and the codec are counted in neither; recomputed activations never are.
"""


@dataclass(frozen=True)
class Measurement:
    """One config on one grid. Times are seconds per step, sizes bytes, counts per step of the whole job."""

    name: str
    config: dict[str, Any]
    """The resolved config."""
    world: int
    grid: dict[str, int]
    device: str
    batches: str
    """`real`, or `synthetic`: drawn sizes, no files."""
    peak_flops: float
    peak_source: str
    steps: list[float]
    """Seconds of each measured step."""
    tokens: float
    tokens_und: float
    tokens_gen: float
    rows: int
    """Rows that the ranks compute, padding included."""
    samples: float
    flops: dict[str, float]
    """official, masked, vit, vae."""
    phases: dict[str, float]
    """Mean over ranks."""
    phased_step: float
    """Seconds of a step while phases are timed, which synchronizes the device and may be slower."""
    busy: list[float]
    """Forward, backward and ViT of each rank."""
    planned: float
    """Most over mean work of a rank, by the plan's FLOPs."""
    memory_peak: list[int]
    """Of each rank: allocated on its GPU, or resident on a CPU."""
    memory_steady: list[int]
    versions: dict[str, str]
    commit: str
    date: str

    @property
    def seconds(self) -> float:
        """Median of the measured steps."""
        return median(self.steps)

    @property
    def tokens_per_s(self) -> float:
        """Per rank."""
        return self.tokens / self.seconds / self.world

    @property
    def samples_per_s(self) -> float:
        """Of the whole job."""
        return self.samples / self.seconds

    def tflops(self, convention: str) -> float:
        """TFLOP/s per rank; convention: official or masked."""
        return self.flops[convention] / self.seconds / self.world / 1e12

    def mfu(self, convention: str) -> float:
        """Share of a device's peak."""
        return self.tflops(convention) * 1e12 / self.peak_flops

    @property
    def padding(self) -> float:
        """Share of the rows that hold no token."""
        return 1 - self.tokens / self.rows

    @property
    def imbalance(self) -> float:
        """Most over mean busy time of a rank, measured."""
        return max(self.busy) / (sum(self.busy) / len(self.busy))


def write(measurements: Sequence[Measurement], path: Path) -> None:
    """Write measurements as JSON. Raises UserError when the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": FORMAT, "measurements": [asdict(measurement) for measurement in measurements]}
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}); choose another --out") from error


def read(path: Path) -> list[Measurement]:
    """Read what `write` wrote. Raises UserError for anything else."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        return [Measurement(**entry) for entry in content["measurements"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a result of `megabagel bench` of this version ({error}); expected its .json file"
        ) from error


_ROWS = (
    ("ranks", lambda m: str(m.world)),
    ("step, s (median)", lambda m: f"{m.seconds:.3f}"),
    ("tokens/s per rank", lambda m: f"{m.tokens_per_s:,.0f}"),
    ("samples/s", lambda m: f"{m.samples_per_s:.1f}"),
    ("TFLOP/s per rank, official", lambda m: f"{m.tflops('official'):.4g}"),
    ("TFLOP/s per rank, masked", lambda m: f"{m.tflops('masked'):.4g}"),
    ("MFU, official", lambda m: f"{m.mfu('official'):.1%}"),
    ("MFU, masked", lambda m: f"{m.mfu('masked'):.1%}"),
    ("und : gen tokens", lambda m: f"1 : {m.tokens_gen / m.tokens_und:.2f}" if m.tokens_und else "0 : 1"),
    ("padding", lambda m: f"{m.padding:.1%}"),
    ("imbalance, planned", lambda m: f"{m.planned:.2f}"),
    ("imbalance, measured", lambda m: f"{m.imbalance:.2f}"),
    ("memory, peak (MiB)", lambda m: f"{max(m.memory_peak) / 2**20:,.0f}"),
    ("memory, steady (MiB)", lambda m: f"{max(m.memory_steady) / 2**20:,.0f}"),
)


def table(measurements: Sequence[Measurement]) -> str:
    """Markdown: a column per measurement."""
    head = ["", *(m.name for m in measurements)]
    body = [[label, *(show(m) for m in measurements)] for label, show in _ROWS]
    names = list(measurements[0].phases)
    shares = [
        [f"{name}, s", *(f"{m.phases.get(name, 0):.3f} ({_share(m, name):.0%})" for m in measurements)]
        for name in names
    ]
    return "\n".join([*_markdown(head, body), "", *_markdown(["phase, mean over ranks", *head[1:]], shares)]) + "\n"


def _share(measurement: Measurement, phase: str) -> float:
    return measurement.phases.get(phase, 0) / (sum(measurement.phases.values()) or 1)


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def document(measurements: Sequence[Measurement], plot: str) -> str:
    """The whole Markdown report; `plot` is the picture's file name."""
    first = measurements[0]
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    slower = ", ".join(f"{m.phased_step / m.seconds:.2f}" for m in measurements)
    return "\n".join([
        "# Throughput",
        "",
        f"`megabagel bench`, {first.date}, commit {first.commit}; {versions}; {first.device}; {first.batches} batches;"
        f" {len(first.steps)} measured steps. Peak of a device: {first.peak_flops:.3g} FLOP/s ({first.peak_source}).",
        "",
        table(measurements),
        f"![Throughput and phases by grid]({plot})",
        "",
        f"Phases come from steps of their own, which took {slower} times as long as the measured ones.",
        "",
        FORMULAS,
    ])  # fmt: skip
