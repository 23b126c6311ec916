"""RMSNorm in Triton against its reference in fp64.

In Triton's interpreter; run by `tests/kernels/triton/test_in_interpreter.py`, in a process of its own.
"""

import os

import pytest
import torch
from megabagel_kernels.rms_norm import add_rms_norm, reference, rms_norm
from torch import Tensor

from tests.kernels.case import CPU
from tests.kernels.exactness import (
    assert_exact,
    assert_gradients_rounded_once,
    both_types,
    every_type,
    guarded_memory,
    low_types,
)  # fmt: skip
from tests.kernels.rms_norm import cases
from tests.kernels.rms_norm.cases import EPS
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)


@both_types
@pytest.mark.parametrize("rows, width", [(1, 64), (17, 100), (65, 64), (129, 72)])
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype):
    for make in (cases.norm, cases.add_norm):
        case = make(CPU, rows, width, dtype)
        assert_exact(case.ours, case.reference, case.leaves)


@low_types
def test_gradients_are_rounded_once(dtype: torch.dtype):
    """Several programs: their partial sums of the gradient of gamma are added in fp32."""
    case = cases.norm(CPU, 129, 64, dtype)
    assert_gradients_rounded_once(case.ours, case.leaves)


def test_gradients_repeat_bit_by_bit():
    case = cases.norm(CPU, 70, 64, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    first, second = (torch.autograd.grad(case.ours(*leaves).sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    x, gamma = torch.zeros(0, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    dx, dgamma = torch.autograd.grad(rms_norm(x, gamma, EPS, engine="triton").sum(), [x, gamma])
    assert dx.shape == (0, 64) and not dgamma.any()


@every_type
def test_the_norm_is_of_the_sum_as_it_is_stored(dtype: torch.dtype):
    """Backward starts from the stored sum, so forward must as well."""
    case = cases.add_norm(CPU, 5, 64, dtype)
    total, normed = case.ours(*case.leaves)
    assert torch.equal(normed, rms_norm(total, case.leaves[2], EPS, engine="triton"))


@every_type
def test_one_of_two_results_used(dtype: torch.dtype):
    case = cases.add_norm(CPU, 5, 64, dtype)
    assert_exact(lambda *a: case.ours(*a)[1], lambda *a: case.reference(*a)[1], case.leaves)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    dresidual, dx, dgamma = torch.autograd.grad(case.ours(*leaves)[0].sum(), leaves)
    assert (dresidual == 1).all() and (dx == 1).all() and not dgamma.any()


X, GAMMA, BIG = torch.zeros(5, 64), torch.ones(64), torch.zeros(1, 64, device="meta")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((X, GAMMA[1:]), r"gamma_D has shape \(63,\), expected \(64,\)"),
        ((X, GAMMA.double()), r"gamma_D has dtype torch.float64, expected torch.float32 or"),
        ((X.int(), GAMMA), r"x_TD has dtype torch.int32, expected torch.float32 or"),
        ((X[0], GAMMA), r"x_TD has shape \(64,\), expected \[T, D\]"),
        ((X.T.contiguous().T, GAMMA), r"x_TD has stride 5 along axis 1, expected 1"),
        ((X, GAMMA.to("meta")), r"gamma_D is on meta, the first argument on cpu"),
        ((BIG.expand(2**26, 64), BIG[0]), r"x_TD reaches element offset 4294967295, expected less than 2147483648"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[Tensor, Tensor], message: str):
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments, EPS, engine="triton")
    if "stride" not in message and "offset" not in message and "float64" not in message:
        with pytest.raises(ValueError, match=message):
            rms_norm(*arguments, EPS, engine="torch")


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_residuals_that_do_not_fit(engine: str):
    for residual, message in (
        (X[1:], r"residual_TD has shape \(4, 64\), expected \(5, 64\)"),
        (X.half(), r"residual_TD has dtype torch.float16, expected torch.float32"),
        (X.to("meta"), r"residual_TD is on meta, the first argument on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            add_rms_norm(residual, X, GAMMA, EPS, engine=engine)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"engine is 'cuda', expected 'torch' or 'triton'"):
        rms_norm(X, GAMMA, EPS, engine="cuda")  # type: ignore[arg-type]


def both(x: Tensor, gamma: Tensor) -> tuple[Tensor, ...]:
    total, normed = add_rms_norm(x, x, gamma, EPS, engine="triton")
    return total, rms_norm(normed, gamma, EPS, engine="triton")


def test_meta_tensors_and_compilers_see_through():
    leaves = [leaf.requires_grad_() for leaf in cases.norm(CPU, 5, 64, torch.float32).leaves]
    values, meta = both(*leaves), both(*(x.to("meta") for x in leaves))
    assert [(y.shape, y.dtype) for y in meta] == [(y.shape, y.dtype) for y in values]
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(*leaves), values, strict=True))
    found, plain = (torch.autograd.grad([y.sum() for y in f(*leaves)], leaves) for f in (compiled, both))
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_reference_by_hand():
    """Mean square 12.5: both engines compare with this definition, so it has to be right by itself."""
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(reference.rms_norm(x, torch.tensor([2.0, 1.0]), 12.5), torch.tensor([[6 / 5, 4 / 5]]))
