"""What the kernels around a layer's linears share: rows [und | gen], each expert's with its own gamma.

A program owns rows of one expert, so gamma is the same for all its rows, and gradients of gamma are sums per program
that are added up afterwards: no atomics, equal inputs give equal bits.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import FLOATS, check_device, check_dtype, check_layout, check_range, check_shape


@triton.jit
def owned_rows(program, border, T, ROWS: tl.constexpr):
    """(start, stop, whether of gen) of a program's rows, at most ROWS: und programs first, then those of gen."""
    und_programs = tl.cdiv(border, ROWS)
    of_gen = program >= und_programs
    start = tl.where(of_gen, border + (program - und_programs) * ROWS, program * ROWS)
    return start, tl.minimum(start + ROWS, tl.where(of_gen, T, border)), of_gen


@triton.jit
def load_gamma(UND, GEN, of_gen, columns, inside):
    """fp32 gamma of a program's expert, zero beyond its end."""
    if of_gen:
        return tl.load(GEN + columns, mask=inside, other=0.0).to(tl.float32)
    return tl.load(UND + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, LIKE):
    """fp32 `x`, rounded to the numbers that the type behind pointer LIKE has."""
    return x.to(LIKE.dtype.element_ty).to(tl.float32)


def programs(border: int, rows: int, each: int) -> tuple[int, int]:
    """Programs of und, and of both."""
    und = triton.cdiv(border, each)
    return und, und + triton.cdiv(rows - border, each)


def sum_parts(parts_PW: Tensor, und_programs: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both experts' gradients of gamma from the sums per program, fp32 [P, W]."""
    und, gen = parts_PW[:und_programs].sum(0), parts_PW[und_programs:].sum(0)
    return und.to(like.dtype), gen.to(like.dtype)


def check_rows(x: Tensor, und_W: Tensor, gen_W: Tensor, border: int, name: str, inner: int) -> None:
    """Raise ValueError unless rows, their gammas and the border fit; the last `inner` axes of rows must lie dense."""
    check_dtype(name, x, *FLOATS)
    check_layout(name, x, inner)
    check_range("border", border, 0, x.shape[0])
    check_dtype("und gamma", und_W, *FLOATS)
    check_dtype("gen gamma", gen_W, und_W.dtype)
    for gamma, tensor in (("und gamma", und_W), ("gen gamma", gen_W)):
        check_shape(gamma, tensor, x.shape[-1:])
        check_layout(gamma, tensor)
    check_device(x, und_gamma=und_W, gen_gamma=gen_W)
