"""The sliced linear cross-entropy against all logits at once."""

import pytest
import torch
from megabagel_kernels.linear_cross_entropy import linear_cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.exactness import both_types
from tests.kernels.linear_cross_entropy import cases


@both_types
@pytest.mark.parametrize("rows, tokens, slice_tokens", cases.SIZES)
def test_equals_the_reference(rows: int, tokens: int, slice_tokens: int, dtype: torch.dtype):
    cases.check_against_reference("torch", rows, tokens, slice_tokens, dtype)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_of_the_vocabulary(shards: int):
    cases.check_shards("torch", shards)


def test_rows_to_ignore():
    cases.check_ignored_rows("torch")


def test_gradients_by_differences():
    hidden_QD, weight_VD, label_Q = cases.inputs(5, 23, torch.float64)
    leaves = (hidden_QD.requires_grad_(), weight_VD.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, label_Q, slice_tokens=7), leaves)


def test_large_logits_do_not_overflow():
    hidden_QD, weight_VD, label_Q = cases.inputs(5, 23)
    hidden_QD = (1000 * hidden_QD).requires_grad_()
    loss_Q = linear_cross_entropy(hidden_QD, weight_VD, label_Q, slice_tokens=7)
    expected = torch.nn.functional.cross_entropy(hidden_QD @ weight_VD.T, label_Q, reduction="none")
    torch.testing.assert_close(loss_Q, expected, rtol=1e-6, atol=1e-3)
    assert torch.autograd.grad(loss_Q.sum(), hidden_QD)[0].isfinite().all()


def test_only_what_learns_gets_a_gradient():
    hidden_QD, weight_VD, label_Q = cases.inputs(5, 23)
    both = (hidden_QD.requires_grad_(), weight_VD.requires_grad_())
    expected = torch.autograd.grad(linear_cross_entropy(*both, label_Q).sum(), both)
    for frozen in (0, 1):
        leaves = [x.detach().requires_grad_(place != frozen) for place, x in enumerate(both)]
        linear_cross_entropy(leaves[0], leaves[1], label_Q).sum().backward()
        learns = leaves[1 - frozen].grad
        assert leaves[frozen].grad is None and learns is not None and torch.equal(learns, expected[1 - frozen])


def test_no_logits_of_all_words_are_held():
    """Peak of one slice: nothing of Q x V is ever made."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.ndim == 2 and len(result) == len(hidden_QD):
                largest = max(largest, result.shape[1])
            return result

    hidden_QD, weight_VD, label_Q = cases.inputs(100, 320)
    with Watch():
        linear_cross_entropy(hidden_QD.requires_grad_(), weight_VD, label_Q, slice_tokens=64).sum().backward()
    assert largest == 64


def test_costs_four_products():
    """One GEMM forward, the same again and two gradients backward."""
    hidden_QD, weight_VD, label_Q = cases.inputs(7, 50)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden_QD.requires_grad_(), weight_VD.requires_grad_(), label_Q).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 7 * 50 * cases.WIDTH


H, W, LABEL = torch.zeros(5, 8), torch.zeros(20, 8), torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((H, W[:, 1:], LABEL), {}, r"weight_VD has shape \(20, 7\), expected \(20, 8\)"),
        ((H, W.half(), LABEL), {}, r"weight_VD has dtype torch.float16, expected torch.float32"),
        ((H, W, LABEL[1:]), {}, r"label_Q has shape \(4,\), expected \(5,\)"),
        ((H, W, LABEL.float()), {}, r"label_Q has dtype torch.float32, expected torch.int32 or torch.int64"),
        ((H, W.to("meta"), LABEL), {}, r"weight_VD is on meta, the first argument on cpu"),
        ((H[0], W, LABEL), {}, r"hidden_QD has shape \(8,\), expected \[Q, D\]"),
        ((H, W, LABEL), {"engine": "fast"}, r"engine is 'fast', expected 'torch' or 'triton'"),
        ((H, W, LABEL), {"slice_tokens": 0}, r"slice_tokens is 0, expected at least 1"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[torch.Tensor, ...], options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*arguments, **options)  # type: ignore[arg-type]
