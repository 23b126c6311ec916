"""QK-norm and RoPE in torch against their formulas, differentiated by autograd.

Letters: T rows, N heads, H head dim.
"""

from functools import partial

import pytest
import torch
from megabagel_kernels.qk_norm_rope import apply_rope, qk_norm_rope
from torch import Tensor

from tests.kernels.formula import Formula, check, draw, fused_part

EPS = 0.3
"""Large, so that leaving it out shows."""


def angles(rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Tables [T, H] in fp64."""
    half = draw(rows, channels // 2, seed=9).detach()
    angle_TH = torch.cat([half, half], 1)
    return angle_TH.cos(), angle_TH.sin()


def plain_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """As complex numbers, channel i the real part and i + H/2 the imaginary one."""
    half = x_TNH.shape[2] // 2
    turned = torch.complex(x_TNH[..., :half], x_TNH[..., half:]) * torch.complex(cos_TH, sin_TH)[:, None, :half]
    return torch.cat([turned.real, turned.imag], -1)


def plain_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gamma


def ours(und: Tensor, gen: Tensor, gamma_und: Tensor, gamma_gen: Tensor) -> Tensor:
    return qk_norm_rope(fused_part(und), fused_part(gen), gamma_und, gamma_gen, *angles(6, 8), EPS)


def plain(und: Tensor, gen: Tensor, gamma_und: Tensor, gamma_gen: Tensor) -> Tensor:
    normed = plain_norm(fused_part(und), gamma_und), plain_norm(fused_part(gen), gamma_gen)
    return plain_rope(torch.cat(normed), *angles(6, 8))


CASES = {
    "rope": Formula(lambda x: apply_rope(x, *angles(6, 8)), lambda x: plain_rope(x, *angles(6, 8)), [draw(6, 3, 8)]),
    "rope of a slice": Formula(
        lambda x: apply_rope(fused_part(x), *angles(6, 8)),
        lambda x: plain_rope(fused_part(x), *angles(6, 8)),
        [draw(6, 40)],
    ),
    "both experts": Formula(ours, plain, [draw(4, 40), draw(2, 40, seed=2), draw(8, seed=3), draw(8, seed=4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_formula(case: str) -> None:
    check(CASES[case])


def test_bf16_is_rotated_in_fp32_and_rounded_once() -> None:
    x, tables = draw(6, 3, 8, dtype=torch.bfloat16), [table.float() for table in angles(6, 8)]
    assert torch.equal(apply_rope(x, *tables), apply_rope(x.float(), *tables).bfloat16())
    once = apply_rope(x.float(), *tables)
    assert not torch.equal(once, once.bfloat16().float())


def test_models_without_qk_norm_only_rotate() -> None:
    und, gen, tables = draw(4, 3, 8), draw(2, 3, 8, seed=2), angles(6, 8)
    found = partial(qk_norm_rope, und, gen, None, None, *tables, EPS)()
    assert torch.allclose(found, plain_rope(torch.cat([und, gen]), *tables), rtol=0, atol=1e-14)
