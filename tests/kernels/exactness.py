"""Comparison of kernels with their references: values and gradients against fp64, on inputs that lie between NaN."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.guards import guarded, guarded_outputs

both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
every_type = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
low_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])

Function = Callable[..., Any]


@pytest.fixture
def guarded_memory() -> Iterator[None]:
    """Every allocation of the test is checked, see `guards.guarded_outputs`."""
    with guarded_outputs():
        yield


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; an absolute one where the truth is nothing."""
    return float((found.double() - truth.double()).norm() / (truth.double().norm() or 1.0))


def outcome(function: Function, leaves: Sequence[Tensor], rest: Sequence[object], low: torch.dtype) -> list[Tensor]:
    """Results, then gradients of the leaves, under upstream gradients that are numbers of type `low`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves, *rest)
    results = [results] if isinstance(results, Tensor) else list(results)
    draw = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=draw).to(low).to(y.dtype) for y in results]
    return [y.detach() for y in results] + list(torch.autograd.grad(results, leaves, upstream))


def assert_exact(function: Function, reference: Function, leaves: Sequence[Tensor], *rest: object) -> None:
    """Results and gradients of floating leaves: fp32 to 1e-6 of fp64, lower types to twice the reference's error."""
    low = leaves[0].dtype
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in rest]
    truth = outcome(reference, [leaf.double() for leaf in leaves], wide, low)
    plain = outcome(reference, leaves, rest, low)
    found = outcome(function, [guarded(leaf) for leaf in leaves], rest, low)
    for place, (result, rounded, exact) in enumerate(zip(found, plain, truth, strict=True)):
        assert result.shape == rounded.shape and result.dtype == rounded.dtype, place
        bound = 1e-6 if low == torch.float32 else max(2 * relative(rounded, exact), 1e-6)
        error = relative(result, exact)
        print(f"{low} result or gradient {place}: error {error:.1e}, allowed {bound:.1e}")  # pytest -rP shows them
        assert error <= bound, (place, error, bound)


def assert_gradients_rounded_once(function: Function, leaves: Sequence[Tensor], *rest: object) -> None:
    """Gradients in a low type are, bit by bit, the rounded ones of the same numbers in fp32: no part of them is kept
    in the low type, which a bound on the error is too wide to see."""
    low, count = leaves[0].dtype, len(leaves)
    found, wide = (outcome(function, x, rest, low)[-count:] for x in (leaves, [leaf.float() for leaf in leaves]))
    for place, (gradient, exact) in enumerate(zip(found, wide, strict=True)):
        assert gradient.dtype == low and torch.equal(gradient, exact.to(low)), place
