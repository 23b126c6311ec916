"""SwiGLU in torch against its formula, differentiated by autograd."""

import torch
from megabagel_kernels.swiglu import swiglu
from torch import Tensor

from tests.kernels.formula import Formula, check, draw


def plain(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def test_the_formula() -> None:
    check(Formula(swiglu, plain, [draw(5, 14)]))
