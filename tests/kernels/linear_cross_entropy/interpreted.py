"""The Triton passes of the linear cross-entropy, by the checks of the torch ones.

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os
from collections.abc import Callable

import pytest
import torch
from megabagel_kernels.linear_cross_entropy import linear_cross_entropy
from megabagel_kernels.linear_cross_entropy.slices import SlicePasses
from megabagel_kernels.linear_cross_entropy.torch import TorchPasses
from megabagel_kernels.linear_cross_entropy.triton import COLS, TritonPasses
from torch import Tensor

from tests.kernels.exactness import both_types, every_type, relative
from tests.kernels.linear_cross_entropy import cases
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()


@both_types
@pytest.mark.parametrize("rows, tokens, slice_tokens", cases.SIZES)
def test_equals_the_reference(rows: int, tokens: int, slice_tokens: int, dtype: torch.dtype):
    cases.check_against_reference("triton", rows, tokens, slice_tokens, dtype)


@pytest.mark.thorough
def test_many_slices_lose_no_bits_of_the_sum():
    """So many that a gradient of hidden states added up in bf16 would leave the bound."""
    cases.check_against_reference("triton", 17, 301, 4, torch.bfloat16)


@every_type
def test_a_slice_of_several_pieces(dtype: torch.dtype):
    """Both passes on more columns than a program takes at once, of a wider tensor."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.full((3, COLS + 100), torch.nan, dtype=dtype)
    logits = whole[:, : COLS + 37].copy_(3 * torch.randn(3, COLS + 37, generator=draw))
    label, dloss = torch.tensor([-4, COLS + 5, COLS + 37]), torch.tensor([0.5, -2.0, 0.0])
    found, exact = (
        after_both_passes(*arguments)
        for arguments in (
            (TritonPasses(), logits, label, dloss),
            (TorchPasses(), logits.double(), label, dloss.double()),
        )
    )
    for place, (a, b) in enumerate(zip(found, exact, strict=True)):
        assert relative(a, b) <= (1e-6 if a.dtype == torch.float32 else 4e-3), place
    assert whole[:, COLS + 37 :].isnan().all()


def after_both_passes(passes: SlicePasses, logits: Tensor, label: Tensor, dloss: Tensor) -> tuple[Tensor, ...]:
    """Log-sum-exp, target logit and gradient, each row with something in its sum before, or nothing."""
    lse, target = torch.tensor([-torch.inf, 9.0, 20.0]).to(dloss), torch.tensor([0.0, 0.0, 5.0]).to(dloss)
    passes.accumulate_(logits, label, lse, target)
    passes.gradient_(logits, label, lse, dloss)
    return lse, target, logits


def test_rows_to_ignore_and_shards():
    cases.check_ignored_rows("triton")
    cases.check_shards("triton", 2)


def test_compilers_see_through():
    hidden_QD, weight_VD, label_Q = cases.inputs(7, 50)
    leaves = (hidden_QD.requires_grad_(), weight_VD.requires_grad_())

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves, label_Q, engine="triton", slice_tokens=16).sum(), leaves)

    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for a, b in zip(gradients(compiled), gradients(linear_cross_entropy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_meta_tensors_see_through():
    hidden, weight = (torch.zeros(n, 16, device="meta", requires_grad=True) for n in (5, 40))
    label = torch.zeros(5, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy(hidden, weight, label, engine="triton", slice_tokens=16)
    loss.sum().backward()
    assert loss.shape == (5,) and weight.grad is not None and weight.grad.shape == (40, 16)
