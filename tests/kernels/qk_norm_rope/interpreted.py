"""QK-norm + RoPE in Triton against its reference in fp64.

In Triton's interpreter; run by `tests/kernels/triton/test_in_interpreter.py`, in a process of its own.
"""

import os
from dataclasses import replace

import pytest
import torch
from megabagel_kernels.qk_norm_rope import qk_norm_rope, reference
from torch import Tensor

from tests.kernels.case import CPU, Function
from tests.kernels.exactness import (
    assert_exact,
    assert_gradients_rounded_once,
    both_types,
    every_type,
    guarded_memory,
    low_types,
)  # fmt: skip
from tests.kernels.qk_norm_rope import cases
from tests.kernels.qk_norm_rope.cases import EPS
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)


@both_types
@pytest.mark.parametrize(
    "num_und, num_gen, heads, head_dim",
    [(1, 0, 1, 64), (5, 12, 5, 72), (17, 112, 1, 128), (100, 29, 5, 64), (0, 17, 1, 128)],
)
def test_equals_the_reference(num_und: int, num_gen: int, heads: int, head_dim: int, dtype: torch.dtype):
    case = cases.heads(CPU, num_und, num_gen, heads, head_dim, dtype)
    assert_exact(case.ours, case.reference, case.leaves)


@every_type
def test_heads_of_fused_projections(dtype: torch.dtype):
    """Queries lie between keys and values; the slice goes in without a copy, its gradient comes back in place."""
    heads, head_dim = 5, 64
    case = cases.heads(CPU, 9, 8, heads, head_dim, dtype)

    def through(function: Function) -> Function:
        def run(fused_und: Tensor, fused_gen: Tensor, *gammas: Tensor) -> Tensor:
            slices = (x.unflatten(1, (-1, head_dim)).split([2, heads, 1], 1)[1] for x in (fused_und, fused_gen))
            return function(*slices, *gammas)  # type: ignore[return-value]

        return run

    fused = [CPU.normal(rows, 8 * head_dim, key="fused", dtype=dtype) for rows in (9, 8)]
    assert_exact(through(case.ours), through(case.reference), [*fused, *case.leaves[2:]])


def test_angles_move_with_their_rows():
    """Rows in any order give the same bits: nothing depends on which program handles a row."""
    (und, gen, *gammas), tables = cases.heads(CPU, 20, 17, 3, 64, torch.float32).leaves, cases.tables(CPU, 37, 64)
    draw = torch.Generator().manual_seed(0)
    in_und, in_gen = torch.randperm(20, generator=draw), torch.randperm(17, generator=draw)
    order = torch.cat([in_und, 20 + in_gen])
    plain = qk_norm_rope(und, gen, *gammas, *tables, EPS, engine="triton")
    moved = [table[order] for table in tables]
    assert torch.equal(qk_norm_rope(und[in_und], gen[in_gen], *gammas, *moved, EPS, engine="triton"), plain[order])


def test_columns_of_a_wider_table():
    """The kernel reads the first half of a table's row, whatever its stride."""
    und, gen, *gammas = cases.heads(CPU, 9, 20, 2, 64, torch.float32).leaves
    tables = cases.tables(CPU, 29, 64)
    wider = [torch.cat([table, torch.full_like(table, torch.nan)], 1)[:, :64] for table in tables]
    found, plain = (qk_norm_rope(und, gen, *gammas, *t, EPS, engine="triton") for t in (wider, tables))
    assert torch.equal(found, plain)


@low_types
def test_gradients_are_rounded_once(dtype: torch.dtype):
    """Several programs of each expert: their partial sums of the gradient of gamma are added in fp32."""
    case = cases.heads(CPU, 65, 64, 3, 64, dtype)
    assert_gradients_rounded_once(case.ours, case.leaves)


def test_no_rows():
    case = cases.heads(CPU, 0, 0, 2, 64, torch.float32)
    assert case.ours(*case.leaves).shape == (0, 2, 64)


def test_without_norm_engines_are_one():
    und, gen, *_ = cases.heads(CPU, 4, 3, 2, 64, torch.float32).leaves
    tables = cases.tables(CPU, 7, 64)
    found, plain = (qk_norm_rope(und, gen, None, None, *tables, EPS, engine=e) for e in ("triton", "torch"))
    assert torch.equal(found, plain)
    assert torch.allclose(found, reference.apply_rope(torch.cat([und, gen]), *tables), rtol=1e-6, atol=1e-6)


UND, GEN, GAMMA, TABLE = torch.zeros(3, 1, 64), torch.zeros(2, 1, 64), torch.ones(64), torch.zeros(5, 64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({0: UND[..., :63]}, r"und_UNH has shape \(3, 1, 63\), expected \[U, N, H\] with an even H"),
        ({0: UND[0]}, r"und_UNH has shape \(1, 64\), expected \[U, N, H\]"),
        ({1: GEN[..., :62]}, r"gen_GNH has shape \(2, 1, 62\), expected \(2, 1, 64\)"),
        ({1: GEN.half()}, r"gen_GNH has dtype torch.float16, expected torch.float32"),
        ({0: UND.view(3, 32, 2).mT, 1: GEN.view(2, 32, 2).mT, 2: GAMMA[:32], 3: GAMMA[:32], 4: TABLE[:, :32],
          5: TABLE[:, :32]}, r"und_UNH has stride 2 along axis 2, expected 1"),
        ({2: GAMMA[1:]}, r"gamma_und_H has shape \(63,\), expected \(64,\)"),
        ({3: GAMMA.to("meta")}, r"gamma_gen_H is on meta, the first argument on cpu"),
        ({4: TABLE[1:]}, r"cos_TH has shape \(4, 64\), expected \(5, 64\)"),
        ({5: TABLE[:, :32]}, r"sin_TH has shape \(5, 32\), expected \(5, 64\)"),
        ({5: TABLE.double()}, r"sin_TH has dtype torch.float64, expected torch.float32"),
        ({5: torch.zeros(5, 70)[:, :64]}, r"cos_TH has row stride 64, sin_TH 70, expected the same"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(changes: dict[int, Tensor], message: str):
    arguments = [changes.get(place, x) for place, x in enumerate((UND, GEN, GAMMA, GAMMA, TABLE, TABLE))]
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*arguments, EPS, engine="triton")


def test_meta_tensors_and_compilers_see_through():
    case = cases.heads(CPU, 3, 2, 1, 64, torch.float32)
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    cos_TH, sin_TH = cases.tables(CPU, 5, 64)
    meta = qk_norm_rope(*(x.to("meta") for x in (*leaves, cos_TH, sin_TH)), EPS, engine="triton")
    assert meta.shape == (5, 1, 64)
    plain = replace(case, ours=lambda *x: qk_norm_rope(*x, cos_TH, sin_TH, EPS, engine="triton")).ours
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*leaves), plain(*leaves))
    found, expected = (torch.autograd.grad(f(*leaves).sum(), leaves) for f in (compiled, plain))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
