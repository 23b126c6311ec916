"""What the ops promise torch: schemas, shapes without values, gradients that are registered, and nothing aliased.

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os
from collections.abc import Callable

import pytest
import torch
from megabagel_kernels import flow_triton, glue_triton_norm, glue_triton_rope, glue_triton_swiglu
from megabagel_kernels import linear_cross_entropy_triton as cross_entropy
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"

ZERO, ONE = torch.zeros(5, dtype=torch.int64), torch.ones(5)


def fixed(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def learns(*shape: int) -> Tensor:
    return fixed(*shape).requires_grad_()


ROTARY = (2, ZERO, fixed(4, 8), fixed(4, 8), 1e-6)
CALLS: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
    "noised_rows": (
        flow_triton._noised_rows,
        (fixed(64), ZERO[:1], ZERO[:1] + 4, ZERO[:1] + 4, ONE[:1], ZERO[:1], ZERO, ZERO, 4, 2, torch.float32),
    ),
    "flow_losses": (
        flow_triton._flow_losses,
        (learns(5, 16), fixed(5, 16), ZERO, ZERO, ONE, fixed(5, 16), ONE, True),
    ),
    "add_rms_norm": (glue_triton_norm._add_rms_norm, (learns(5, 16), learns(5, 16), learns(16), learns(16), 2, 1e-6)),
    "rms_norm": (glue_triton_norm._rms_norm, (learns(5, 16), learns(16), learns(16), 2, 1e-6)),
    "rms_norm_backward": (
        glue_triton_norm._backward,
        (fixed(5, 16), None, fixed(5, 16), fixed(16), fixed(16), 2, 1e-6),
    ),
    "qk_norm_rope": (glue_triton_rope._qk_norm_rope, (learns(5, 2, 16), learns(16), learns(16), *ROTARY)),
    "qk_norm_rope_backward": (
        glue_triton_rope._backward,
        (fixed(5, 2, 16), fixed(5, 2, 16), fixed(16), fixed(16), *ROTARY),
    ),
    "swiglu": (glue_triton_swiglu._swiglu, (learns(5, 16),)),
    "swiglu_backward": (glue_triton_swiglu._backward, (fixed(5, 16), fixed(5, 8))),
    "cross_entropy_fold": (cross_entropy._fold, (fixed(5, 16), ZERO, fixed(5), fixed(5))),
    "cross_entropy_gradient": (cross_entropy._gradient, (fixed(5, 16), ZERO, fixed(5), fixed(5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_op(name: str):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments)  # type: ignore[arg-type]
