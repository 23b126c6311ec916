"""Norms by expert, rotary embedding and SwiGLU in Triton against their references in fp64.

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os

import pytest
import torch
from megabagel_kernels import reference
from megabagel_kernels.glue_triton_norm import add_rms_norm, rms_norm
from megabagel_kernels.glue_triton_rope import qk_norm_rope
from megabagel_kernels.glue_triton_swiglu import swiglu
from torch import Tensor

from tests.kernels.triton import bf16_shim
from tests.kernels.triton.exactness import (
    assert_exact,
    assert_gradients_rounded_once,
    both_types,
    every_type,
    guarded_memory,
    low_types,
)  # fmt: skip

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)

EPS = 0.05  # large enough to be missed where it is left out


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Keyed by its shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 31 * len(shape))).to(dtype)


def angles(heads_half: int) -> tuple[Tensor, Tensor]:
    """Tables of 40 positions, as columns of a wider table."""
    angle = torch.outer(torch.arange(40.0), 100.0 ** -torch.linspace(0, 1, 2 * heads_half))
    return angle.cos()[:, :heads_half], angle.sin()[:, :heads_half]


def positions(rows: int) -> Tensor:
    return torch.randint(40, (rows,), generator=torch.Generator().manual_seed(rows))


@both_types
@pytest.mark.parametrize("rows, border, width", [(1, 0, 64), (1, 1, 100), (17, 5, 100), (129, 65, 64), (129, 129, 72)])
def test_norms(rows: int, border: int, width: int, dtype: torch.dtype):
    x, residual = normal(rows, width, dtype=dtype), 3 * normal(rows, width, dtype=dtype).flip(0)
    gammas = [1 + normal(width, dtype=dtype), 1 - normal(width, dtype=dtype)]
    assert_exact(add_rms_norm, reference.add_rms_norm, [x, residual, *gammas], border, EPS)
    assert_exact(rms_norm, reference.rms_norm, [x, *gammas], border, EPS)


@both_types
@pytest.mark.parametrize(
    "rows, border, heads, width", [(1, 1, 1, 64), (17, 5, 5, 72), (129, 17, 1, 128), (129, 100, 5, 64), (17, 0, 1, 128)]
)
def test_heads(rows: int, border: int, heads: int, width: int, dtype: torch.dtype):
    gammas = [1 + normal(width, dtype=dtype), 1 - normal(width, dtype=dtype)]
    x = normal(rows, heads, width, dtype=dtype)
    assert_exact(
        lambda x, *rest: qk_norm_rope(x.contiguous(), *rest), reference.qk_norm_rope, [x, *gammas],
        border, positions(rows), *angles(width // 2), EPS,
    )  # fmt: skip


@every_type
def test_heads_of_a_fused_projection(dtype: torch.dtype):
    """Queries lie between keys and values; their slice goes in without a copy, its gradient comes back in place."""
    rows, heads, width = 17, 5, 64

    def through(function: object) -> object:
        def run(fused: Tensor, und: Tensor, gen: Tensor) -> Tensor:
            _, q, _ = fused.unflatten(1, (-1, width)).split([2, heads, 1], 1)
            return function(q, und, gen, 9, positions(rows), *angles(width // 2), EPS)  # type: ignore[operator]

        return run

    leaves = [normal(rows, 8 * width, dtype=dtype), normal(width, dtype=dtype), 1 - normal(width, dtype=dtype)]
    assert_exact(through(qk_norm_rope), through(reference.qk_norm_rope), leaves)


@every_type
@pytest.mark.parametrize("rows, width", [(1, 7), (17, 1100), (129, 64)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype):
    assert_exact(swiglu, reference.swiglu, [3 * normal(rows, 2 * width, dtype=dtype)])


def test_positions_move_with_their_rows():
    """Rows in any order give the same bits: nothing depends on which program a row falls to."""
    x, draw = normal(37, 3, 64), torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(20, generator=draw), 20 + torch.randperm(17, generator=draw)])
    gammas, tables = (normal(64), normal(64) + 1), angles(32)
    plain = qk_norm_rope(x, *gammas, 20, positions(37), *tables, EPS)
    assert torch.equal(qk_norm_rope(x[order], *gammas, 20, positions(37)[order], *tables, EPS), plain[order])


@low_types
def test_gradients_are_rounded_once(dtype: torch.dtype):
    """Several programs of each expert: their parts of the gradient of gamma are added in fp32."""
    gammas = [1 + normal(64, dtype=dtype), 1 - normal(64, dtype=dtype)]
    assert_gradients_rounded_once(rms_norm, [normal(129, 64, dtype=dtype), *gammas], 65, EPS)
    heads = normal(129, 3, 64, dtype=dtype)
    assert_gradients_rounded_once(qk_norm_rope, [heads, *gammas], 65, positions(129), *angles(32), EPS)


def test_gradients_repeat_bit_by_bit():
    x, gammas = normal(70, 64).requires_grad_(), [normal(64).requires_grad_(), (normal(64) + 1).requires_grad_()]
    first, second = (torch.autograd.grad(rms_norm(x, *gammas, 33, EPS).sum(), [x, *gammas]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_rows():
    x, gammas = torch.zeros(0, 64, requires_grad=True), [torch.ones(64, requires_grad=True) for _ in range(2)]
    gradients = torch.autograd.grad(rms_norm(x, *gammas, 0, EPS).sum(), [x, *gammas])
    assert gradients[0].shape == (0, 64) and not torch.cat(gradients[1:]).any()
    assert swiglu(torch.zeros(0, 6)).shape == (0, 3)
    assert qk_norm_rope(torch.zeros(0, 2, 64), *gammas, 0, positions(0), *angles(32), EPS).shape == (0, 2, 64)


@every_type
def test_the_norm_is_of_the_sum_as_it_is_stored(dtype: torch.dtype):
    """Backward starts from the stored sum, so forward must as well."""
    gammas = [normal(64, dtype=dtype), normal(64, dtype=dtype)]
    total, normed = add_rms_norm(normal(5, 64, dtype=dtype), normal(6, 64, dtype=dtype)[1:], *gammas, 2, EPS)
    assert torch.equal(normed, rms_norm(total, *gammas, 2, EPS))


@every_type
def test_one_of_two_results_used(dtype: torch.dtype):
    leaves = [x.to(dtype) for x in (normal(5, 64), normal(6, 64)[1:], normal(64), normal(64) + 1)]
    assert_exact(lambda *a: add_rms_norm(*a)[1], lambda *a: reference.add_rms_norm(*a)[1], leaves, 2, EPS)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    gradients = torch.autograd.grad(add_rms_norm(*leaves, 2, EPS)[0].sum(), leaves)
    assert (torch.cat(gradients[:2]) == 1).all() and not torch.cat(gradients[2:]).any()


X, GAMMA, TABLE, WHERE = torch.zeros(5, 64), torch.ones(64), torch.zeros(40, 32), torch.zeros(5, dtype=torch.int64)
HEADS, BIG = X[:, None], torch.zeros(1, 64, device="meta")


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: add_rms_norm(X, X[1:], GAMMA, GAMMA, 2, EPS), r"residual_TW has shape \(4, 64\), expected \(5, 64\)"),
        (
            lambda: add_rms_norm(X, X.half(), GAMMA, GAMMA, 2, EPS),
            r"residual_TW has type torch.float16, expected",
        ),
        (lambda: rms_norm(X, GAMMA[1:], GAMMA, 2, EPS), r"und gamma has shape \(63,\), expected \(64,\)"),
        (lambda: rms_norm(X, GAMMA, GAMMA.half(), 2, EPS), r"gen gamma has type torch.float16, expected torch.float32"),
        (lambda: rms_norm(X, GAMMA, GAMMA, 6, EPS), r"border is 6, expected 0 to 5"),
        (lambda: rms_norm(X.int(), GAMMA, GAMMA, 2, EPS), r"x_TW has type torch.int32, expected torch.float32 or"),
        (lambda: rms_norm(X[0], GAMMA, GAMMA, 2, EPS), r"x_TW has shape \(64,\), expected two axes"),
        (lambda: rms_norm(X.T.contiguous().T, GAMMA, GAMMA, 2, EPS), r"x_TW has stride 5 along axis 1, expected 1"),
        (lambda: rms_norm(X, GAMMA.to("meta"), GAMMA, 2, EPS), r"und_gamma lies on meta, the first argument on cpu"),
        (
            lambda: rms_norm(BIG.expand(2**26, 64), *[BIG[0]] * 2, 2, EPS),
            r"x_TW reaches element offset 4294967295, expected less than 2147483648",
        ),
        (
            lambda: qk_norm_rope(HEADS[..., :63], GAMMA[:63], GAMMA[:63], 2, WHERE, TABLE, TABLE, EPS),
            r"x_TNH has shape \(5, 1, 63\), expected \[rows, heads, an even",
        ),
        (
            lambda: qk_norm_rope(X.view(5, 32, 2).mT, GAMMA[:32], GAMMA[:32], 2, WHERE, TABLE, TABLE, EPS),
            r"x_TNH has stride 2 along axis 2, expected 1",
        ),
        (
            lambda: qk_norm_rope(HEADS, GAMMA, GAMMA, 2, WHERE[1:], TABLE, TABLE, EPS),
            r"position_T has shape \(4,\), expected \(5,\)",
        ),
        (
            lambda: qk_norm_rope(HEADS, GAMMA, GAMMA, 2, WHERE, TABLE.repeat(1, 2), TABLE, EPS),
            r"cos_PR has shape \(40, 64\), expected \(40, 32\)",
        ),
        (
            lambda: qk_norm_rope(HEADS, GAMMA, GAMMA, 2, WHERE, TABLE, TABLE.double(), EPS),
            r"sin_PR has type torch.float64, expected torch.float32",
        ),
        (lambda: swiglu(X[:, :63]), r"gate_up_T2F has shape \(5, 63\), expected \[rows, an even"),
        (lambda: swiglu(X[:, ::2]), r"gate_up_T2F has stride 2 along axis 1, expected 1"),
    ],
)
def test_arguments_that_do_not_fit(call: object, message: str):
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def everything(x: Tensor, heads: Tensor, gamma: Tensor, where: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    total, normed = add_rms_norm(x, x, gamma, gamma, 2, EPS)
    return (
        total,
        rms_norm(normed, gamma, gamma, 2, EPS),
        qk_norm_rope(heads, gamma, gamma, 2, where, table, table, EPS),
        swiglu(x),
    )


def test_meta_tensors_and_compilers_see_through():
    arguments = (normal(5, 64), normal(5, 1, 64), GAMMA, WHERE, TABLE + 0.5)
    values = everything(*arguments)
    meta = everything(*(x.to("meta") for x in arguments))
    assert [(y.shape, y.dtype) for y in meta] == [(y.shape, y.dtype) for y in values]
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in arguments[:3]]
    assert all(torch.equal(a, b) for a, b in zip(compiled(*leaves, *arguments[3:]), values, strict=True))
    found, plain = (
        torch.autograd.grad([y.sum() for y in f(*leaves, *arguments[3:])], leaves) for f in (compiled, everything)
    )
    for a, b in zip(found, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
