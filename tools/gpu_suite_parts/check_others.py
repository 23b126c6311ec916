"""The kernels around attention on the device against their references: values and gradients.

The calls are those of the operations' own tests (`tests/kernels/<operation>/cases.py`), at the sizes of the 7B model.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from megabagel_kernels.flow import noised_rows
from megabagel_kernels.philox import noise_rows
from torch import Tensor

from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from tests.kernels.case import Case, Function
from tests.kernels.flow import cases as flow
from tests.kernels.guards import guarded, guarded_outputs
from tests.kernels.linear_cross_entropy import cases as linear_cross_entropy
from tests.kernels.qk_norm_rope import cases as qk_norm_rope
from tests.kernels.rms_norm import cases as rms_norm
from tests.kernels.swiglu import cases as swiglu

FP32_BOUND = 1e-5
"""Relative error of fp32 results, from the approximate functions of a GPU."""

NOISE_FAR = 1e-2
"""Largest difference of one draw: the square root steepens rounding of logarithms near 0. Wrong draws differ by 1."""

EPS = 1e-6

Checks = Iterator[tuple[str, Case]]
"""Kernel as the report names it, and a call of it."""


def run(setting: Setting, report: Report) -> None:
    """Norms, rotation, SwiGLU, flow loss and token loss in bf16 and fp32; then noise."""
    for dtype in (torch.bfloat16, torch.float32):
        suffix = str(dtype).removeprefix("torch.")
        for kernel, case in checks(setting, dtype):
            report.check("check-others", f"{case.name} {suffix}", kernel, partial(exactness, setting, case))
        report.check("check-others", f"noised rows {suffix}", "flow", partial(noised, setting, dtype))
    report.check("check-others", "noise", "flow", partial(noise, setting))


def checks(setting: Setting, dtype: torch.dtype) -> Checks:
    """Every operation; head dims of the ViT and of small models too."""
    rows, width = setting.pick((4099, 3584), (11, 100))
    yield "norm", rms_norm.add_norm(setting, rows, width, dtype, EPS)
    yield "norm", rms_norm.norm(setting, rows, width, dtype, EPS)
    num_und, num_gen = setting.pick((683, 1368), (4, 7))
    for count, head_dim in setting.pick([(28, 128), (4, 128), (16, 72), (12, 64)], [(3, 128), (2, 72)]):
        yield "rope", qk_norm_rope.heads(setting, num_und, num_gen, count, head_dim, dtype, EPS)
    yield "swiglu", swiglu.mlp(setting, *setting.pick((1027, 18944), (5, 1100)), dtype)
    for case in flow.losses(setting, setting.pick(16411, 45), flow.FEATURES, dtype):
        yield "flow", case
    sizes = setting.pick((1027, 1024, 20011, 8192), (7, 32, 517, 256))
    yield "cross-entropy", linear_cross_entropy.head(setting, *sizes, dtype)


def exactness(setting: Setting, case: Case) -> Result:
    """Worst error of results and gradients relative to fp64; 16-bit types: in units of the reference in that type."""
    low = case.leaves[0].dtype
    truth = outcome(setting, case.reference, [x.double() for x in case.leaves], low)
    with guarded_outputs():
        found = outcome(setting, case.ours, [guarded(x) for x in case.leaves], low)
        again = outcome(setting, case.ours, [guarded(x) for x in case.leaves], low)
    repeats = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    errors = [relative(x, exact) for x, exact in zip(found, truth, strict=True)]
    bounds = [FP32_BOUND] * len(errors)
    if low != torch.float32:
        rounded = outcome(setting, case.reference, case.leaves, low)
        bounds = [max(2 * relative(x, exact), FP32_BOUND) for x, exact in zip(rounded, truth, strict=True)]
    right = repeats and all(error <= bound for error, bound in zip(errors, bounds, strict=True))
    pairs = "; ".join(f"{error:.1e} <= {bound:.1e}" for error, bound in zip(errors, bounds, strict=True))
    return {"right": right, "repeats": repeats, "results, gradients": pairs}


def outcome(setting: Setting, function: Function, leaves: list[Tensor], low: torch.dtype) -> list[Tensor]:
    """Results, then gradients of the leaves under upstream gradients that are numbers of type `low`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else [y for y in found if y is not None]
    upstream = [setting.normal(*y.shape, key=f"way {i}", dtype=low).to(y.dtype) for i, y in enumerate(results)]
    return [y.detach() for y in results] + list(torch.autograd.grad(results, leaves, upstream))


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((found.double() - truth.double()).norm() / truth.double().norm())


def sizes(setting: Setting) -> list[tuple[int, int]]:
    """Heights and widths of latent images."""
    return setting.pick([(128, 128), (64, 96), (96, 64), (34, 126)], [(4, 6), (8, 2)])


def noised(setting: Setting, dtype: torch.dtype) -> Result:
    """Patches, noise and the mark of real rows, where one image is lost."""
    images, image_G, patch_index_G = flow.latents(setting, sizes(setting), dtype)
    images.latents[5] = torch.nan
    with guarded_outputs():
        found = noised_rows(images, image_G, patch_index_G, engine="triton")
    expected = noised_rows(images, image_G, patch_index_G)
    error = max(relative(found.x_t_GZ, expected.x_t_GZ), relative(found.target_GZ, expected.target_GZ))
    same = torch.equal(found.real_G, expected.real_G)
    return {"right": same and error <= FP32_BOUND, "results, gradients": f"{error:.1e} <= {FP32_BOUND:.1e}"}


def noise(setting: Setting) -> Result:
    """The kernel's draws are `philox.noise_rows`: at timestep 1 nothing else is left."""
    images, image_G, patch_index_G = flow.latents(setting, sizes(setting), torch.float32, padding=0)
    images = replace(images, time_I=torch.ones_like(images.time_I))
    found = noised_rows(images, image_G, patch_index_G, engine="triton").x_t_GZ
    expected = noise_rows(images.seed_I[image_G], patch_index_G, flow.FEATURES)
    error, far = relative(found, expected), float((found - expected).abs().max())
    right = error <= FP32_BOUND and far <= NOISE_FAR
    return {"right": right, "results, gradients": f"{error:.1e} <= {FP32_BOUND:.1e}; farthest {far:.1e}"}
