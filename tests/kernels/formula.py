"""Checks of a torch engine: its formula and gradients in fp64, fp32 and bf16, and equal bits under recomputation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Formula:
    """An operation, its formula for autograd, and fp64 inputs of both."""

    ours: Function
    plain: Function
    inputs: list[Tensor]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal numbers with a gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def fused_part(x: Tensor) -> Tensor:
    """Heads 1 to 3 of 5, as of a fused projection."""
    return x.unflatten(-1, (5, -1))[:, 1:4]


def results(function: Function, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, draw(*out.shape, seed=5).detach().to(dtype))]


def check(case: Formula) -> None:
    """Values and gradients against the formula and against differences; recomputation repeats every bit."""
    expected = results(case.plain, case.inputs, torch.float64)
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 5e-7), (torch.bfloat16, 1e-2)):
        for x, y in zip(results(case.ours, case.inputs, dtype), expected, strict=True):
            assert x.shape == y.shape and x.dtype == dtype
            assert (x - y).norm() <= bound * y.norm()
    assert torch.autograd.gradcheck(case.ours, case.inputs)
    again = partial(checkpoint, case.ours, use_reentrant=False)
    kept, made_again = (results(f, case.inputs, torch.float32) for f in (case.ours, again))
    assert all(torch.equal(x, y) for x, y in zip(kept, made_again, strict=True))
