"""The kernels around attention on the device against their references: values and gradients.

Letters as in the references: T rows, W width, N heads, H head dim, F width of an MLP, K rows, I hidden, V words,
G rows of latent tokens, C numbers of each.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from megabagel_kernels import flow, flow_triton, glue_triton_norm, glue_triton_rope, glue_triton_swiglu, reference
from megabagel_kernels.flow import KeyedTarget, LatentImages, Reference
from megabagel_kernels.linear_cross_entropy import linear_cross_entropy
from megabagel_kernels.philox import noise_rows
from torch import Tensor

from gpu_suite_parts.guards import guarded, guarded_outputs
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting

FP32_BOUND = 1e-5
"""Relative error of fp32 results, from the approximate functions of a GPU."""

NOISE_FAR = 1e-2
"""Largest difference of one draw: the square root steepens rounding of logarithms near 0. Wrong draws differ by 1."""

EPS = 1e-6
FEATURES = 64

Function = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Check:
    """An operation and its reference, both functions of `leaves`."""

    kernel: str
    name: str
    ours: Function
    reference: Function
    leaves: list[Tensor]


def run(setting: Setting, report: Report) -> None:
    """Norms, rotation, SwiGLU, flow loss and word loss in bf16 and fp32; then noise."""
    for dtype in (torch.bfloat16, torch.float32):
        suffix = str(dtype).removeprefix("torch.")
        for make in (norms, heads, mlps, flow_losses, words):
            for check in make(setting, dtype):
                work = partial(exactness, setting, check)
                report.check("check-others", f"{check.name} {suffix}", check.kernel, work)
        report.check("check-others", f"noised rows {suffix}", "flow", partial(noised, setting, dtype))
    report.check("check-others", "noise", "flow", partial(noise, setting))


def exactness(setting: Setting, check: Check) -> Result:
    """Worst error of results and gradients relative to fp64; 16-bit types: in units of the reference in that type."""
    low = check.leaves[0].dtype
    truth = outcome(setting, check.reference, [x.double() for x in check.leaves], low)
    with guarded_outputs():
        found = outcome(setting, check.ours, [guarded(x) for x in check.leaves], low)
        again = outcome(setting, check.ours, [guarded(x) for x in check.leaves], low)
    repeats = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    errors = [relative(x, exact) for x, exact in zip(found, truth, strict=True)]
    bounds = [FP32_BOUND] * len(errors)
    if low != torch.float32:
        rounded = outcome(setting, check.reference, check.leaves, low)
        bounds = [max(2 * relative(x, exact), FP32_BOUND) for x, exact in zip(rounded, truth, strict=True)]
    right = repeats and all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    pairs = "; ".join(f"{error:.1e} <= {bound:.1e}" for error, bound in zip(errors, bounds, strict=True))
    return {"right": right, "repeats": repeats, "results, gradients": pairs}


def outcome(setting: Setting, function: Function, leaves: list[Tensor], low: torch.dtype) -> list[Tensor]:
    """Results, then gradients of the leaves under upstream gradients that are numbers of type `low`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else [y for y in found if y is not None]
    ways = [y for y in results if y.requires_grad]
    upstream = [setting.normal(*y.shape, key=f"way {i}", dtype=low).to(y.dtype) for i, y in enumerate(ways)]
    return [y.detach() for y in results] + list(torch.autograd.grad(ways, leaves, upstream))


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def norms(setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """At the width of the 7B model, rows of both experts."""
    rows, width = setting.pick((4099, 3584), (11, 100))
    border = rows // 3
    x, residual = (setting.normal(rows, width, key=f"norm {name}", dtype=dtype) for name in "xr")
    gammas = [1 + setting.normal(width, key=f"gamma {name}", dtype=dtype) for name in ("und", "gen")]

    def bound(function: Function) -> Function:
        return lambda *leaves: function(*leaves, border, EPS)

    add = bound(glue_triton_norm.add_rms_norm), bound(reference.add_rms_norm)
    yield Check("norm", "add + norm", *add, [x, residual, *gammas])
    yield Check("norm", "norm", bound(glue_triton_norm.rms_norm), bound(reference.rms_norm), [x, *gammas])


def heads(setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """Query and key heads as slices of a fused projection; head dims of the ViT and of small models too."""
    rows, positions = setting.pick((2051, 4096), (11, 40))
    border, position_T = rows // 3, setting.integers(positions, rows, key="positions")
    for count, width in setting.pick([(28, 128), (4, 128), (16, 72), (12, 64)], [(3, 128), (2, 72)]):
        x = setting.normal(rows, count, width, key="heads", dtype=dtype)
        gammas = [1 + setting.normal(width, key=f"gamma {name}", dtype=dtype) for name in ("und", "gen")]
        angle_PR = setting.normal(positions, width // 2, key="angles", dtype=torch.float32)
        rest = border, position_T, angle_PR.cos(), angle_PR.sin(), EPS

        def bound(function: Function, rest: tuple[object, ...] = rest) -> Function:
            return lambda *leaves: function(*leaves, *rest)

        pair = bound(glue_triton_rope.qk_norm_rope), bound(reference.qk_norm_rope)
        yield Check("rope", f"QK-norm + RoPE {count} x {width}", *pair, [x, *gammas])


def mlps(setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """SwiGLU at the width of the 7B model."""
    rows, width = setting.pick((1027, 18944), (5, 1100))
    gate_up = setting.normal(rows, 2 * width, key="gate and up", dtype=dtype)
    yield Check("swiglu", "SwiGLU", glue_triton_swiglu.swiglu, reference.swiglu, [gate_up])


def flow_losses(setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """Loss and gradient with keyed noise, with and without the reference term."""
    rows = setting.pick(16411, 45)
    v, x0, ref = (setting.normal(rows, FEATURES, key=f"flow {name}", dtype=dtype) for name in ("v", "x0", "ref"))
    seed = setting.integers(2**62, rows, key="seeds")
    target = KeyedTarget(x0, seed, setting.integers(4096, rows, key="places"))
    weight, lam = (setting.normal(rows, key=f"flow {name}", dtype=torch.float32).abs() for name in ("w", "lambda"))
    for name, held in (("flow loss", None), ("flow loss to a reference", Reference(ref, lam))):
        pair = [partial(_losses, engine, target, weight, held) for engine in (flow_triton, flow)]
        yield Check("flow", name, *pair, [v])


def _losses(
    engine: object, target: KeyedTarget, weight_G: Tensor, held: Reference | None, v_GC: Tensor
) -> Sequence[Tensor]:
    return engine.flow_losses(v_GC, target, weight_G, held)  # type: ignore[attr-defined]


def words(setting: Setting, dtype: torch.dtype) -> Iterator[Check]:
    """Cross-entropy over a vocabulary of several slices, some rows without a label."""
    rows, width, vocabulary, cut = setting.pick((1027, 1024, 20011, 8192), (7, 32, 517, 256))
    hidden = setting.normal(rows, width, key="hidden", dtype=dtype)
    weight = setting.normal(vocabulary, width, key="words", dtype=dtype) * width**-0.5
    label = setting.integers(vocabulary, rows, key="labels").masked_fill(torch.arange(rows).to(hidden.device) < 3, -100)
    ours = partial(_word_loss, label, cut)
    yield Check("cross-entropy", "linear cross-entropy", ours, lambda *x: reference.linear_cross_entropy(*x, label),
                [hidden, weight])  # fmt: skip


def _word_loss(label_Q: Tensor, cut: int, hidden_QD: Tensor, weight_VD: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_QD, weight_VD, label_Q, engine="triton", slice_words=cut)


def latents(setting: Setting, dtype: torch.dtype) -> tuple[LatentImages, Tensor, Tensor]:
    """A buffer of 16-channel images of several sizes; for every token and some padding, its image and place."""
    sizes = setting.pick([(128, 128), (64, 96), (96, 64), (34, 126)], [(4, 6), (8, 2)])
    count = torch.tensor([16 * height * width for height, width in sizes])
    of = {"device": setting.device}
    images = LatentImages(
        setting.normal(int(count.sum()), key="cells", dtype=dtype),
        (count.cumsum(0) - count).to(**of), *(torch.tensor(side, **of) for side in zip(*sizes, strict=True)),
        setting.normal(len(sizes), key="times", dtype=torch.float32).sigmoid(),
        setting.integers(2**62, len(sizes), key="image seeds"), 16, 2,
    )  # fmt: skip
    tokens = (count // FEATURES).tolist()
    image_G = torch.cat([torch.arange(len(sizes)).repeat_interleave(torch.tensor(tokens)), torch.full((7,), -1)])
    place_G = torch.cat([*(torch.arange(number) for number in tokens), torch.arange(7)])
    return images, image_G.to(**of), place_G.to(**of)


def noised(setting: Setting, dtype: torch.dtype) -> Result:
    """Patches, noise and the mark of real rows, where one image is lost."""
    images, image_G, place_G = latents(setting, dtype)
    images.cells[5] = torch.nan
    with guarded_outputs():
        found = flow_triton.noised_rows(images, image_G, place_G)
    expected = flow.noised_rows(images, image_G, place_G)
    error = max(relative(found.x_t_GC, expected.x_t_GC), relative(found.target_GC, expected.target_GC))
    same = torch.equal(found.real_G, expected.real_G)
    return {"right": same and error <= FP32_BOUND, "results, gradients": f"{error:.1e} <= {FP32_BOUND:.1e}"}


def noise(setting: Setting) -> Result:
    """The kernel's draws are `philox.noise_rows`: at timestep 1 nothing else is left."""
    images, image_G, place_G = (x[:-7] if isinstance(x, Tensor) else x for x in latents(setting, torch.float32))
    images = replace(images, time_I=torch.ones_like(images.time_I))
    found = flow_triton.noised_rows(images, image_G, place_G).x_t_GC
    expected = noise_rows(images.seed_I[image_G], place_G, FEATURES)
    error, far = relative(found, expected), float((found - expected).abs().max())
    right = error <= FP32_BOUND and far <= NOISE_FAR
    return {"right": right, "results, gradients": f"{error:.1e} <= {FP32_BOUND:.1e}; farthest {far:.1e}"}
