"""Published results, as data with their sources, for `megabagel evaluate report`.

A number is comparable only with the same judge, questions and settings: the source says which paper to look into.
"""

from typing import NamedTuple

BAGEL = "BAGEL, arXiv:2505.14683"
SRUM = "SRUM, table 1 (judge Qwen2.5-VL-72B)"
REASON = "SRUM, table 5"


class Figure(NamedTuple):
    """One published number."""

    model: str
    suite: str
    score: str
    """Name of the line in the suite's table."""
    value: float
    source: str


def _columns(model: str, suite: str, names: str, values: str, source: str) -> tuple[Figure, ...]:
    pairs = zip(names.split(", "), map(float, values.split()), strict=True)
    return tuple(Figure(model, suite, name, value, source) for name, value in pairs)


_COMP = "3d_spatial, color, complex composite, non_spatial, numeracy, shape, spatial, texture, overall"
_REASON = (
    "entity: accuracy, entity: quality, idiom: accuracy, idiom: quality, scientific: accuracy, scientific: quality, "
    "textual_image: accuracy, textual_image: quality"
)
_TABLE1 = {
    "FLUX.1-dev": "76.39 90.63 83.51 87.47 75.30 80.20 84.23 87.07 83.10",
    "SD-3-medium": "77.83 91.63 84.73 86.12 72.80 83.72 88.20 89.03 84.26",
    "BLIP3o": "81.73 89.92 85.55 84.78 71.67 83.75 92.47 87.45 84.66",
    "BAGEL": "77.98 89.30 83.32 85.03 70.40 81.94 81.52 87.93 82.18",
    "BAGEL (thinking)": "84.66 88.85 86.10 85.64 75.36 84.33 82.71 88.07 84.46",
    "BAGEL + SRUM": "83.10 92.90 88.69 88.47 78.52 84.23 86.92 89.57 86.55",
    "BAGEL + SRUM (thinking)": "88.60 92.90 91.31 90.48 80.12 84.47 89.93 89.15 88.37",
}
_TABLE5 = {
    "BAGEL": "36.9 88.1 29.7 77.3 40.2 69.5 40.49 71.5",
    "BAGEL + SFT": "38.4 86.9 35.1 78.4 40.3 68.9 41.2 70.0",
    "BAGEL + SRUM": "40.9 88.7 36.1 80.2 40.7 69.2 42.86 72.6",
}

FIGURES: tuple[Figure, ...] = (
    Figure("BAGEL", "mme", "perception", 1687, BAGEL),
    Figure("BAGEL", "mme", "sum", 2388, BAGEL),
    Figure("BAGEL", "mmbench", "accuracy", 85.0, BAGEL),
    Figure("BAGEL", "mmmu", "accuracy", 55.3, BAGEL),
    Figure("BAGEL", "mm-vet", "accuracy", 67.2, BAGEL),
    Figure("BAGEL", "mathvista", "accuracy", 73.1, BAGEL),
    Figure("BAGEL", "mmvp", "pairs", 69.3, BAGEL),
    Figure("BAGEL", "geneval", "overall", 0.82, BAGEL),
    Figure("BAGEL (rewritten prompts)", "geneval", "overall", 0.88, BAGEL),
    *_columns("BAGEL", "wise", "Cultural, Time, Space, Biology, Physics, Chemistry", ".44 .55 .68 .44 .60 .39", BAGEL),
    Figure("BAGEL", "wise", "overall", 0.52, BAGEL),
    Figure("BAGEL (thinking)", "wise", "overall", 0.70, BAGEL),
    Figure("BAGEL", "intelligentbench", "overall", 44.9, BAGEL),
    Figure("BAGEL (thinking)", "intelligentbench", "overall", 55.3, BAGEL),
    Figure("BAGEL", "imgedit", "overall", 3.28, "BAGEL, repository, EVAL.md"),
    Figure("BAGEL", "kris", "overall", 56.21, "BAGEL, repository, EVAL.md"),
    Figure("BAGEL (thinking)", "kris", "overall", 60.18, "BAGEL, repository, EVAL.md"),
    Figure("BAGEL", "rise", "overall: accuracy", 6.1, "BAGEL, repository, EVAL.md"),
    Figure("BAGEL (thinking)", "rise", "overall: accuracy", 11.9, "BAGEL, repository, EVAL.md"),
    *(figure for model, row in _TABLE1.items() for figure in _columns(model, "t2i-compbench", _COMP, row, SRUM)),
    *(figure for model, row in _TABLE5.items() for figure in _columns(model, "t2i-reasonbench", _REASON, row, REASON)),
)
