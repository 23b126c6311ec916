"""RMS norm, rotary embedding and SwiGLU against their formulas, differentiated by autograd.

Letters: T rows, N heads, H channels of a head.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from megabagel_kernels.pointwise import rms_norm, rotate, swiglu
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EPS = 0.3
"""Large, so that leaving it out shows."""


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def angles(rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Tables [T, H] in fp64."""
    angle_Th = draw(rows, channels // 2, seed=9).detach()
    angle_TH = torch.cat([angle_Th, angle_Th], 1)
    return angle_TH.cos(), angle_TH.sin()


def plain_rotation(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """As complex numbers, channel i the real part and i + H/2 the imaginary one."""
    half = x_TNH.shape[2] // 2
    turned = torch.complex(x_TNH[..., :half], x_TNH[..., half:]) * torch.complex(cos_TH, sin_TH)[:, None, :half]
    return torch.cat([turned.real, turned.imag], -1)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def fused_part(x: Tensor) -> Tensor:
    """Heads 1 to 3 of 5, as of a fused projection."""
    return x.unflatten(-1, (5, -1))[:, 1:4]


NORM = partial(rms_norm, eps=EPS)
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "norm of rows": (NORM, plain_norm, [draw(7, 12), draw(12, seed=1)]),
    "norm of heads in a slice": (
        lambda x, weight: NORM(fused_part(x), weight),
        lambda x, weight: plain_norm(fused_part(x), weight),
        [draw(7, 40), draw(8, seed=1)],
    ),
    "norm of a transposed tensor": (
        lambda x, weight: NORM(x.transpose(0, 1), weight),
        lambda x, weight: plain_norm(x.transpose(0, 1), weight),
        [draw(3, 5, 8), draw(8, seed=1)],
    ),
    "norm of no rows": (NORM, plain_norm, [draw(0, 12), draw(12, seed=1)]),
    "rotation": (lambda x: rotate(x, *angles(6, 8)), lambda x: plain_rotation(x, *angles(6, 8)), [draw(6, 3, 8)]),
    "rotation of a slice": (
        lambda x: rotate(fused_part(x), *angles(6, 8)),
        lambda x: plain_rotation(fused_part(x), *angles(6, 8)),
        [draw(6, 40)],
    ),
    "swiglu": (swiglu, plain_swiglu, [draw(5, 14)]),
}

by_case = pytest.mark.parametrize("case", CASES)


def results(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, seed=5).detach().to(dtype))]


@by_case
def test_the_formula_and_its_gradient(case: str) -> None:
    ours, plain, inputs = CASES[case]
    expected = results(plain, inputs, torch.float64)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 5e-7), (torch.bfloat16, 1e-2)):
        for x, y in zip(results(ours, inputs, dtype), expected, strict=True):
            assert x.shape == y.shape and x.dtype == dtype
            assert (x - y).norm() <= bound * y.norm()


@by_case
def test_gradients_by_differences(case: str) -> None:
    ours, _, inputs = CASES[case]
    assert torch.autograd.gradcheck(ours, inputs)


@by_case
def test_recomputation_gives_the_same_bits(case: str) -> None:
    ours, _, inputs = CASES[case]
    again = partial(checkpoint, ours, use_reentrant=False)
    kept, made_again = (results(f, inputs, torch.float32) for f in (ours, again))
    assert all(torch.equal(x, y) for x, y in zip(kept, made_again, strict=True))


def test_the_norm_rounds_before_the_weight_and_after_it() -> None:
    """Rows of mean square 6.25 are divided by 2.5; bf16 has 8 digits, and rounding once would show."""
    x = torch.tensor([[3, -4, 0, 0], [0, 4, 0, 3]], dtype=torch.bfloat16).repeat(1, 8)
    weight = draw(32, dtype=torch.bfloat16)
    expected = (x.double() / 2.5).bfloat16().double() * weight.double()
    found = rms_norm(x, weight, 0.0)
    assert torch.equal(found, expected.bfloat16())
    assert not torch.equal(found, (x.double() / 2.5 * weight.double()).bfloat16())


def test_bf16_is_rotated_in_fp32_and_rounded_once() -> None:
    x, tables = draw(6, 3, 8, dtype=torch.bfloat16), [table.float() for table in angles(6, 8)]
    assert torch.equal(rotate(x, *tables), rotate(x.float(), *tables).bfloat16())
    once = rotate(x.float(), *tables)
    assert not torch.equal(once, once.bfloat16().float())
