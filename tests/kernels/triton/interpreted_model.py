"""What the model calls, in Triton beside torch: the same numbers, and in bf16 the same rounding.

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from megabagel_kernels.flow import LatentImages
from torch import Tensor

from megabagel.model.inputs import Rope
from megabagel.model.kernels import TORCH, Kernels, triton_kernels
from megabagel.model.positions import rope_tables
from tests.kernels.exactness import both_types, relative
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()

TRITON, EPS = triton_kernels(), 0.05
UND, GEN, HEADS, WIDTH = 13, 6, 3, 16


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 31 * len(shape))).to(dtype)


def heads(kernels: Kernels, normed: bool, fused_und: Tensor, fused_gen: Tensor, und: Tensor, gen: Tensor) -> Tensor:
    """Slices of fused projections of both experts."""
    parts = (x.unflatten(1, (-1, WIDTH))[:, 1 : 1 + HEADS] for x in (fused_und, fused_gen))
    rope = Rope(*rope_tables(torch.arange(UND + GEN) * 7 % 40, WIDTH, 100.0))
    return kernels.qk_norm_rope(*parts, und if normed else None, gen if normed else None, EPS, rope)


def calls(kernels: Kernels) -> dict[str, tuple[Callable[..., Tensor | Sequence[Tensor]], tuple[tuple[int, ...], ...]]]:
    """Operations, and the shapes of their arguments."""
    fused = (UND, 6 * WIDTH), (GEN, 6 * WIDTH)
    target, weight = normal(GEN, 12), normal(GEN).abs()
    return {
        "norm": (lambda x, gamma: kernels.norm(x, gamma, EPS), ((UND, 40), (40,))),
        "norm of a sum": (lambda *x: kernels.add_norm(*x, EPS), ((UND, 40), (UND, 40), (40,))),
        "heads": (partial(heads, kernels, True), (*fused, (WIDTH,), (WIDTH,))),
        "heads without norm": (partial(heads, kernels, False), (*fused, (WIDTH,), (WIDTH,))),
        "swiglu": (kernels.swiglu, ((UND, 30),)),
        "flow loss": (lambda v: kernels.flow_loss(v, target, weight), ((GEN, 12),)),
    }


def outcome(kernels: Kernels, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Results, then gradients."""
    function, shapes = calls(kernels)[name]
    leaves = [(1 + normal(*shape)).to(dtype).requires_grad_() for shape in shapes]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else list(found)
    upstream = [normal(*y.shape, dtype=y.dtype) for y in results]
    gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    return [y.detach() for y in results] + [x for x in gradients if x is not None]


@both_types
@pytest.mark.parametrize("name", calls(TORCH))
def test_as_torch(name: str, dtype: torch.dtype):
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    torchs, tritons = (outcome(kernels, name, dtype) for kernels in (TORCH, TRITON))
    for expected, found in zip(torchs, tritons, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert relative(found, expected) <= bound
    same = tritons[0] == torchs[0]
    if dtype == torch.bfloat16 and name != "flow loss":  # whose result is fp32
        assert same.float().mean() > 0.98  # a rounding more or less would move a third of the numbers


def test_frozen_weights_take_no_gradient():
    x, gamma = normal(UND, 40).requires_grad_(), normal(40)
    total, normed = TRITON.add_norm(x, normal(UND, 40), gamma, EPS)
    (found,) = torch.autograd.grad((total * normed).sum(), x)
    total, normed = TORCH.add_norm(x, normal(UND, 40), gamma, EPS)
    assert relative(found, torch.autograd.grad((total * normed).sum(), x)[0]) <= 1e-6
    assert not TRITON.norm(normal(UND, 40), gamma, EPS).requires_grad


def test_noised_rows():
    sizes = torch.tensor([4, 2]), torch.tensor([2, 6])
    images = LatentImages(
        normal(3 * 8 + 3 * 12), torch.tensor([0, 24]), *sizes, torch.tensor([0.3, 1.0]), torch.tensor([5, -7]), 3, 2
    )
    images.latents[30] = torch.nan
    image_G, patch_index_G = torch.tensor([0, -1, 0, 1, 1, -1]), torch.tensor([1, 0, 0, 2, 0, 9])
    expected, found = (kernels.noised_rows(images, image_G, patch_index_G) for kernels in (TORCH, TRITON))
    assert expected.real_G.tolist() == found.real_G.tolist() and 2 <= expected.real_G.sum() < 4
    for a, b in zip(expected[:2], found[:2], strict=True):
        assert relative(b, a) <= 1e-6
