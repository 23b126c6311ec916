"""SwiGLU. Letters: T rows, F MLP width."""

from functools import partial

import torch
from megabagel_kernels.swiglu import reference, swiglu

from tests.kernels.case import Case, Numbers


def mlp(numbers: Numbers, rows: int, width: int, dtype: torch.dtype) -> Case:
    """Gates and ups that reach into both flat ends of the sigmoid."""
    gate_up = 3 * numbers.normal(rows, 2 * width, key="gate and up", dtype=dtype)
    return Case("SwiGLU", partial(swiglu, engine="triton"), reference.swiglu, [gate_up])
