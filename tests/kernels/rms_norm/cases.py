"""RMSNorm and residual add + RMSNorm. Letters: T rows, D width."""

import torch
from megabagel_kernels.rms_norm import add_rms_norm, reference, rms_norm

from tests.kernels.case import Case, Numbers

EPS = 0.05
"""Large, so that leaving it out shows."""


def norm(numbers: Numbers, rows: int, width: int, dtype: torch.dtype, eps: float = EPS) -> Case:
    """The norm of a block of rows."""
    x_TD = numbers.normal(rows, width, key="norm x", dtype=dtype)
    gamma_D = 1 + numbers.normal(width, key="gamma", dtype=dtype)
    return Case(
        "norm",
        lambda x, gamma: rms_norm(x, gamma, eps, engine="triton"),
        lambda x, gamma: reference.rms_norm(x, gamma, eps),
        [x_TD, gamma_D],
    )


def add_norm(numbers: Numbers, rows: int, width: int, dtype: torch.dtype, eps: float = EPS) -> Case:
    """The sum with a residual that is three times as large, and its norm."""
    residual_TD = 3 * numbers.normal(rows, width, key="norm residual", dtype=dtype)
    x_TD, gamma_D = norm(numbers, rows, width, dtype).leaves
    return Case(
        "add + norm",
        lambda residual, x, gamma: add_rms_norm(residual, x, gamma, eps, engine="triton"),
        lambda residual, x, gamma: reference.add_rms_norm(residual, x, gamma, eps),
        [residual_TD, x_TD, gamma_D],
    )
