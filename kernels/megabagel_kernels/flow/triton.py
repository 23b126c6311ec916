"""Triton kernels of rectified flow on latent tokens: noising, and the loss with its gradient.

Noise is never stored: both kernels draw it where they need it, with Triton's Philox, from the 64-bit seed of the image
and the number of the draw, patch index * Z + feature. `philox.noise_rows` gives the same numbers.

A program handles ROWS rows.

Letters: G gen rows (latent tokens), Z latent features of a token, ZP the next power of two.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.checks import check_launch
from megabagel_kernels.flow.types import FlowLosses, KeyedTarget, LatentImages, NoisedRows, Reference

ROWS, WARPS = 32, 4


@triton.jit(do_not_specialize=["G"])
def noise_patches(
    LATENTS, START, HEIGHT, WIDTH, TIME, SEED, IMAGE, PATCH_INDEX, X_T, TARGET, REAL, G,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, ZP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """X_T, TARGET [G, Z] and REAL [G] of ROWS rows: gather, cut into patches and noise in one pass."""
    Z: tl.constexpr = CHANNELS * PATCH * PATCH
    g = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, ZP)
    channel, inner = feature % CHANNELS, feature // CHANNELS
    inside = g < G
    image = tl.load(IMAGE + g, mask=inside, other=-1).to(tl.int32)
    not_padding = image >= 0
    image = tl.where(not_padding, image, 0)
    patch_index = tl.load(PATCH_INDEX + g, mask=not_padding, other=0).to(tl.int32)
    height, width = tl.load(HEIGHT + image).to(tl.int32), tl.load(WIDTH + image).to(tl.int32)
    start = tl.load(START + image).to(tl.int32)
    time = tl.load(TIME + image)

    patches = width // PATCH
    row = (patch_index // patches * PATCH)[:, None] + (inner // PATCH)[None, :]
    column = (patch_index % patches * PATCH)[:, None] + (inner % PATCH)[None, :]
    offset = start[:, None] + (channel[None, :] * height[:, None] + row) * width[:, None] + column
    used = (feature < Z)[None, :]
    x0 = tl.load(LATENTS + offset, mask=not_padding[:, None] & used, other=0.0).to(tl.float32)
    # |x| < inf is false for NaN too. Masked features count as finite, so ZP of them are finite in a good row.
    real = not_padding & (tl.sum((tl.abs(x0) < float("inf")).to(tl.int32), 1) == ZP)
    x0 = tl.where(real[:, None], x0, 0.0)
    eps = tl.randn(tl.load(SEED + image)[:, None], patch_index[:, None] * Z + feature[None, :])
    x_t = (1.0 - time)[:, None] * x0 + time[:, None] * eps

    to = g[:, None] * Z + feature[None, :]
    kept = inside[:, None] & used
    tl.store(X_T + to, tl.where(real[:, None], x_t, 0.0).to(X_T.dtype.element_ty), mask=kept)
    tl.store(TARGET + to, tl.where(real[:, None], eps - x0, 0.0), mask=kept)
    tl.store(REAL + g, real, mask=inside)


@triton.jit(do_not_specialize=["G"])
def loss_and_gradient(
    V, TARGET, SEED, PATCH_INDEX, WEIGHT, REF, REF_WEIGHT, TOTAL, MSE, DISTANCE, GRADIENT,
    G, v_stride, target_stride, ref_stride,
    KEYED: tl.constexpr, HAS_REF: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    Z: tl.constexpr, ZP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Losses [G] of ROWS rows, and GRADIENT [G, Z] of their totals with respect to V.

    KEYED: TARGET holds x_0 and the velocity is eps - x_0; otherwise TARGET holds the velocity.
    """
    g = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, ZP)
    inside = g < G
    used = inside[:, None] & (feature < Z)[None, :]
    v = tl.load(V + g[:, None] * v_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
    velocity = tl.load(TARGET + g[:, None] * target_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
    if KEYED:
        seed = tl.load(SEED + g, mask=inside, other=0)
        patch_index = tl.load(PATCH_INDEX + g, mask=inside, other=0).to(tl.int32)
        velocity = tl.randn(seed[:, None], patch_index[:, None] * Z + feature[None, :]) - velocity
    error = tl.where(used, v - velocity, 0.0)
    weight = tl.load(WEIGHT + g, mask=inside, other=0.0)
    mse = tl.sum(error * error, 1) / Z
    total = mse * weight
    gradient = error * weight[:, None]
    if HAS_REF:
        ref = tl.load(REF + g[:, None] * ref_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
        error = tl.where(used, v - ref, 0.0)
        weight = tl.load(REF_WEIGHT + g, mask=inside, other=0.0)
        distance = tl.sum(error * error, 1) / Z
        total += distance * weight
        gradient += error * weight[:, None]
        tl.store(DISTANCE + g, distance, mask=inside)
    tl.store(TOTAL + g, total, mask=inside)
    tl.store(MSE + g, mse, mask=inside)
    if HAS_GRADIENT:
        to = GRADIENT + g[:, None] * Z + feature[None, :]
        tl.store(to, gradient * (2.0 / Z), mask=used)


def noised_rows(images: LatentImages, image_G: Tensor, patch_index_G: Tensor, dtype: torch.dtype) -> NoisedRows:
    """See `functional.noised_rows`, which has checked the arguments."""
    return NoisedRows(
        *_noised_rows(
            images.latents, images.start_I, images.height_I, images.width_I, images.time_I, images.seed_I,
            image_G, patch_index_G, images.channels, images.patch, dtype,
        )
    )  # fmt: skip


@torch.library.custom_op("megabagel::noised_rows", mutates_args=())
def _noised_rows(
    latents: Tensor, start_I: Tensor, height_I: Tensor, width_I: Tensor, time_I: Tensor, seed_I: Tensor,
    image_G: Tensor, patch_index_G: Tensor, channels: int, patch: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_launch(noise_patches, latents)
    rows, features = len(image_G), channels * patch**2
    x_t_GZ, target_GZ, real_G = _empty_rows(latents, rows, features, dtype)
    if rows:
        noise_patches[(triton.cdiv(rows, ROWS),)](
            latents, start_I, height_I, width_I, time_I, seed_I, image_G, patch_index_G,
            x_t_GZ, target_GZ, real_G, rows,
            CHANNELS=channels, PATCH=patch, ZP=triton.next_power_of_2(features), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return x_t_GZ, target_GZ, real_G


def _empty_rows(latents: Tensor, rows: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_t_GZ = latents.new_empty(rows, features, dtype=dtype)
    target_GZ = latents.new_empty(rows, features, dtype=torch.float32)
    return x_t_GZ, target_GZ, latents.new_empty(rows, dtype=torch.bool)


@_noised_rows.register_fake
def _(latents: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, image_G, _, channels, patch, dtype = rest
    return _empty_rows(latents, image_G.shape[0], channels * patch**2, dtype)


def flow_losses(
    v_GZ: Tensor, target: Tensor | KeyedTarget, weight_G: Tensor, reference: Reference | None
) -> FlowLosses:
    """See `functional.flow_losses`, which has checked the arguments. Differentiable in `v_GZ`.

    The gradient is made together with the losses, because both read the same rows, and only if one is needed.
    """
    keyed = target if isinstance(target, KeyedTarget) else None
    target_GZ = target if isinstance(target, Tensor) else target.x0_GZ
    seed_G, patch_index_G = (keyed.seed_G, keyed.patch_index_G) if keyed else (None, None)
    ref_GZ, ref_weight_G = (reference.velocity_GZ, reference.weight_G) if reference else (None, None)
    needs_gradient = v_GZ.requires_grad and torch.is_grad_enabled()
    total_G, mse_G, distance_G, _ = _flow_losses(
        v_GZ, target_GZ, seed_G, patch_index_G, weight_G, ref_GZ, ref_weight_G, needs_gradient
    )
    return FlowLosses(total_G, mse_G, distance_G if reference else None)


@torch.library.custom_op("megabagel::flow_losses", mutates_args=())
def _flow_losses(
    v_GZ: Tensor, target_GZ: Tensor, seed_G: Tensor | None, patch_index_G: Tensor | None, weight_G: Tensor,
    ref_GZ: Tensor | None, ref_weight_G: Tensor | None, needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_launch(loss_and_gradient, v_GZ)
    rows, features = v_GZ.shape
    total_G, mse_G, distance_G, gradient_GZ = _empty_losses(v_GZ, ref_GZ is not None, needs_gradient)
    if rows:
        loss_and_gradient[(triton.cdiv(rows, ROWS),)](
            v_GZ, target_GZ, seed_G, patch_index_G, weight_G, ref_GZ, ref_weight_G,
            total_G, mse_G, distance_G, gradient_GZ, rows,
            v_GZ.stride(0), target_GZ.stride(0), 0 if ref_GZ is None else ref_GZ.stride(0),
            KEYED=seed_G is not None, HAS_REF=ref_GZ is not None, HAS_GRADIENT=needs_gradient,
            Z=features, ZP=triton.next_power_of_2(features), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return total_G, mse_G, distance_G, gradient_GZ


def _empty_losses(v_GZ: Tensor, has_ref: bool, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = v_GZ.shape
    total_G, mse_G = (v_GZ.new_empty(rows, dtype=torch.float32) for _ in range(2))
    distance_G = v_GZ.new_empty(rows if has_ref else 0, dtype=torch.float32)
    gradient_GZ = v_GZ.new_empty(rows if needs_gradient else 0, features, dtype=torch.float32)
    return total_G, mse_G, distance_G, gradient_GZ


@_flow_losses.register_fake
def _(v_GZ: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, ref_GZ, _, needs_gradient = rest
    return _empty_losses(v_GZ, ref_GZ is not None, needs_gradient)


def _save_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[3])


def _scale_gradient(ctx: Any, dtotal_G: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient_GZ,) = ctx.saved_tensors
    return (gradient_GZ * dtotal_G[:, None]).to(ctx.dtype), *[None] * 7


_flow_losses.register_autograd(_scale_gradient, setup_context=_save_gradient)
