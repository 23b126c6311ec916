"""Operators as torch sees them: schemas, shapes of meta tensors, registered gradients, no aliasing (`opcheck`).

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os
from collections.abc import Callable

import pytest
import torch
from megabagel_kernels.flow import triton as flow
from megabagel_kernels.linear_cross_entropy import triton as cross_entropy
from megabagel_kernels.qk_norm_rope import triton as qk_norm_rope
from megabagel_kernels.rms_norm import triton as rms_norm
from megabagel_kernels.swiglu import triton as swiglu
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"

ZERO, ONE = torch.zeros(5, dtype=torch.int64), torch.ones(5)


def fixed(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def learns(*shape: int) -> Tensor:
    return fixed(*shape).requires_grad_()


TABLES = (fixed(5, 16), fixed(5, 16), 1e-6)
CALLS: dict[str, tuple[Callable[..., object], tuple[object, ...]]] = {
    "noised_rows": (
        flow._noised_rows,
        (fixed(64), ZERO[:1], ZERO[:1] + 4, ZERO[:1] + 4, ONE[:1], ZERO[:1], ZERO, ZERO, 4, 2, torch.float32),
    ),
    "flow_losses": (
        flow._flow_losses,
        (learns(5, 16), fixed(5, 16), ZERO, ZERO, ONE, fixed(5, 16), ONE, True),
    ),
    "add_rms_norm": (rms_norm._add_rms_norm, (learns(5, 16), learns(5, 16), learns(16), 1e-6)),
    "rms_norm": (rms_norm._rms_norm, (learns(5, 16), learns(16), 1e-6)),
    "rms_norm_backward": (rms_norm._backward, (fixed(5, 16), None, fixed(5, 16), fixed(16), 1e-6)),
    "qk_norm_rope": (
        qk_norm_rope._qk_norm_rope,
        (learns(3, 2, 16), learns(2, 2, 16), learns(16), learns(16), *TABLES),
    ),
    "qk_norm_rope_backward": (
        qk_norm_rope._backward,
        (fixed(5, 2, 16), fixed(3, 2, 16), fixed(2, 2, 16), fixed(16), fixed(16), *TABLES),
    ),
    "swiglu": (swiglu._swiglu, (learns(5, 16),)),
    "swiglu_backward": (swiglu._backward, (fixed(5, 16), fixed(5, 8))),
    "cross_entropy_fold": (cross_entropy._accumulate, (fixed(5, 16), ZERO, fixed(5), fixed(5))),
    "cross_entropy_gradient": (cross_entropy._gradient, (fixed(5, 16), ZERO, fixed(5), fixed(5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_op(name: str):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments)  # type: ignore[arg-type]
