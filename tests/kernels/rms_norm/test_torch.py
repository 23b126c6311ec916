"""RMSNorm in torch against its formula, differentiated by autograd."""

from functools import partial

import pytest
import torch
from megabagel_kernels.rms_norm import rms_norm
from megabagel_kernels.rms_norm.torch import rms_norm as norm_of_any_shape
from torch import Tensor

from tests.kernels.formula import Formula, check, draw, fused_part

EPS = 0.3
"""Large, so that leaving it out shows."""

NORM = partial(norm_of_any_shape, eps=EPS)


def plain_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gamma


CASES = {
    "rows": Formula(partial(rms_norm, eps=EPS), plain_norm, [draw(7, 12), draw(12, seed=1)]),
    "heads in a slice": Formula(
        lambda x, gamma: NORM(fused_part(x), gamma),
        lambda x, gamma: plain_norm(fused_part(x), gamma),
        [draw(7, 40), draw(8, seed=1)],
    ),
    "a transposed tensor": Formula(
        lambda x, gamma: NORM(x.transpose(0, 1), gamma),
        lambda x, gamma: plain_norm(x.transpose(0, 1), gamma),
        [draw(3, 5, 8), draw(8, seed=1)],
    ),
    "no rows": Formula(partial(rms_norm, eps=EPS), plain_norm, [draw(0, 12), draw(12, seed=1)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_formula(case: str) -> None:
    check(CASES[case])


def test_bf16_is_rounded_before_gamma_and_after_it() -> None:
    """Rows of mean square 6.25 are divided by 2.5; bf16 has 8 digits, and rounding once would show."""
    x = torch.tensor([[3, -4, 0, 0], [0, 4, 0, 3]], dtype=torch.bfloat16).repeat(1, 8)
    gamma = draw(32, dtype=torch.bfloat16)
    expected = (x.double() / 2.5).bfloat16().double() * gamma.double()
    found = rms_norm(x, gamma, 0.0)
    assert torch.equal(found, expected.bfloat16())
    assert not torch.equal(found, (x.double() / 2.5 * gamma.double()).bfloat16())
