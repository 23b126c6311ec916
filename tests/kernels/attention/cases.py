"""Random attention calls by the Triton engine in the interpreter, by the dense reference in fp64, and by plain torch.

Inputs are slices of larger tensors full of NaN, and so are the tensors that the engine allocates: reading outside an
input or leaving an output unwritten gives NaN, and writing outside an output is found afterwards.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from megabagel_kernels.attention.configs import Config, Configs, tile_width
from megabagel_kernels.attention.mask import AttentionRanges, dense_mask
from megabagel_kernels.attention.reference import attention_reference
from megabagel_kernels.attention.triton import plan_triton, triton_attention_lse
from torch import Tensor

from tests.kernels.attention.packs import Pack, Segment, ranges_of
from tests.kernels.guards import guarded, guarded_outputs

NAMES = ("out", "lse", "dq", "dk", "dv")
HEADS = [(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (7, 1)]
HEAD_DIMS = [16, 32, 64, 72, 80, 96, 128]
LENGTHS = {
    "any": [*range(1, 40)],
    "block edges": [15, 16, 17, 31, 32, 33, 63, 64, 65],
    "tiny": [1, 1, 1, 2, 3],
    "images": [12, 16, 24],
}


@dataclass(frozen=True)
class Case:
    """One call with everything that decides its result."""

    ranges: AttentionRanges
    configs: Configs
    heads: tuple[int, int]
    head_dim: int
    seed: int
    scale: float | None = None


def random_case(seed: int) -> Case:
    """A case that depends on the seed alone."""
    rng = np.random.default_rng(seed)
    ranges = ranges_of(random_pack(rng, int(rng.integers(20, 130)))).padded(int(rng.choice([0, 0, 3, 40])))
    ranges = ranges.take(*random_selection(rng, ranges.queries))
    sizes = [Config(int(rng.choice([16, 32, 64])), int(rng.choice([16, 32, 64])), 4, 1) for _ in range(3)]
    descriptors, split = bool(rng.integers(2)), bool(rng.integers(2))
    configs = Configs(*sizes, descriptors=descriptors, split_below=10**6 if split else 0)
    heads = HEADS[rng.integers(len(HEADS))]
    head_dim = int(rng.choice([dim for dim in HEAD_DIMS if dim == tile_width(dim) or not descriptors]))
    return Case(ranges, configs, heads, head_dim, seed, None if rng.integers(4) else 0.1)


def random_pack(rng: np.random.Generator, tokens: int) -> Pack:
    """Samples of texts, images, noised images alone, in groups and in chains, with one kind of split lengths."""
    lengths = LENGTHS[rng.choice(list(LENGTHS))]
    pack: Pack = []
    while tokens > 0:
        chained, segments = bool(rng.integers(2)), []
        for _ in range(rng.integers(1, 7)):
            mode = str(rng.choice(["causal", "causal", "full", "full", "noise", "noise", "noise"]))
            group = int(rng.integers(4)) if mode == "noise" else 0
            in_chain = chained and mode == "noise" and group < 2
            segments.append(Segment(min(int(rng.choice(lengths)), max(tokens, 1)), mode, group, in_chain))
            tokens -= segments[-1].length
        pack.append(segments)
    return pack


def random_selection(rng: np.random.Generator, total: int) -> list[npt.NDArray[np.int64] | None]:
    """Queries and keys of the call: all, the same in another order, or parts as a context-parallel rank has them."""
    shuffled = rng.permutation(total)
    few = np.sort(rng.permutation(total)[: rng.integers(1, total + 1)])
    chunks = np.concatenate(np.array_split(np.arange(total), 4)[:: rng.choice([1, 2, -2])])
    choices = [(None, None), (None, None), (shuffled, shuffled), (few, None), (chunks, few), (few[:1], None)]
    return list(choices[rng.integers(len(choices))])


def normal(case: Case, draw: int, *shape: int) -> Tensor:
    """Normal fp64 numbers, other ones for each draw of a case."""
    generator = torch.Generator().manual_seed(10 * case.seed + draw)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def inputs_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """q [T, N, H] between NaN, and k, v [S, M, H] as slices of one fused projection between NaN."""
    (heads, kv_heads), dim = case.heads, case.head_dim
    q = guarded(normal(case, 0, case.ranges.queries, heads * dim).to(dtype))
    kv = guarded(normal(case, 1, case.ranges.keys, 2 * kv_heads * dim).to(dtype))
    k, v = kv.split(kv_heads * dim, dim=1)
    return [x.unflatten(1, (-1, dim)).detach().requires_grad_() for x in (q, k, v)]


def results(attention, case: Case, inputs: list[Tensor], blind_gradient: float = 0.0) -> list[Tensor]:
    """out, lse, dq, dk, dv of `attention` for normal gradients of out and of lse.

    `blind_gradient` takes the place of the gradient of an lse of -inf.
    """
    out, lse = attention(*inputs)
    blind = torch.from_numpy(~dense_mask(case.ranges).any(1))
    grad = normal(case, 2, *out.shape)
    grad_lse = normal(case, 3, *lse.shape).masked_fill(blind, blind_gradient)
    grads = torch.autograd.grad([out, lse], inputs, [grad.to(out.dtype), grad_lse.to(lse.dtype)])
    return [out.detach(), lse.detach(), *grads]


def by_triton(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The engine's results; whatever reaches an lse of -inf as gradient has no effect."""
    plan = plan_triton(case.ranges, case.configs)

    def attention(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return triton_attention_lse(*qkv, plan, case.scale)

    with guarded_outputs():
        return results(attention, case, inputs_of(case, dtype), blind_gradient=math.nan)


def by_reference(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The dense reference in fp64, from inputs and gradients rounded to `dtype`."""
    inputs = [x.detach().double().requires_grad_() for x in inputs_of(case, dtype)]

    def rounded(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention_reference(*qkv, case.ranges, case.scale)
        return RoundedGradient.apply(out, dtype), lse

    return results(rounded, case, inputs)


class RoundedGradient(torch.autograd.Function):
    """The identity; its gradient passes through a dtype, as the gradient of an output of that dtype does."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


def by_plain_torch(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Results of `plain_attention`."""
    return results(lambda *qkv: plain_attention(*qkv, case.ranges, case.scale), case, inputs_of(case, dtype))


def plain_attention(
    q_TNH: Tensor, k_KMH: Tensor, v_KMH: Tensor, ranges: AttentionRanges, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as one would write it in torch with every tensor in the dtype of the inputs.

    Its error is the yardstick for rounding errors of a kernel.
    """
    group = q_TNH.shape[1] // k_KMH.shape[1]
    k_NKH, v_NKH = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k_KMH, v_KMH))
    hidden_TS = ~torch.from_numpy(dense_mask(ranges)).to(q_TNH.device)
    scale = q_TNH.shape[2] ** -0.5 if scale is None else scale
    score_NTK = (q_TNH.transpose(0, 1) @ k_NKH.transpose(1, 2) * scale).masked_fill(hidden_TS, -math.inf)
    weight_NTK = score_NTK.softmax(2).masked_fill(hidden_TS, 0)
    return (weight_NTK @ v_NKH).transpose(0, 1), score_NTK.logsumexp(2)


def errors(found: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    """Error of each result relative to its norm.

    dq and dk vanish where each query sees one key, so the norm of dv counts as their least norm; likewise 1 for lse.
    """
    seen = expected[1].isfinite()
    assert torch.equal(found[1], found[1].masked_fill(~seen, -math.inf)), "lse is -inf exactly where nothing is seen"
    found, expected = ([out, lse.masked_fill(~seen, 0), *rest] for out, lse, *rest in (found, expected))
    out, lse, dq, dk, dv = (float(x.norm()) for x in expected)
    norms = (out, max(lse, 1.0), max(dq, dv), max(dk, dv), dv)
    pairs = zip(NAMES, found, expected, norms, strict=True)
    return {name: float((x.double() - y).norm()) / (norm or 1.0) for name, x, y, norm in pairs}
