"""Triton kernels of rectified flow on latent tokens: noising, and the loss with its gradient. References: `flow.py`.

Noise is never stored: both kernels draw it where they need it, as `philox.noise_rows` does, from the 64-bit seed of the
image and the number of the draw, place * C + feature.

Letters: G rows of latent tokens, C numbers of each, CP the next power of two; ROWS rows of one program.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megabagel_kernels.door import (
    FLOATS,
    INTEGERS,
    OFFSET_LIMIT,
    check_device,
    check_dtype,
    check_launch,
    check_layout,
    check_shape,
)  # fmt: skip
from megabagel_kernels.flow import FlowLosses, KeyedTarget, LatentImages, NoisedRows, Reference

ROWS, WARPS = 32, 4


@triton.jit(do_not_specialize=["G"])
def noise_patches(
    CELLS, START, HEIGHT, WIDTH, TIME, SEED, IMAGE, PLACE, X_T, TARGET, REAL, G,
    CHANNELS: tl.constexpr, PATCH: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """X_T, TARGET [G, C] and REAL [G] of ROWS rows: gather, cut into patches and noise in one pass."""
    C: tl.constexpr = CHANNELS * PATCH * PATCH
    g = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, CP)
    channel, inner = feature % CHANNELS, feature // CHANNELS
    inside = g < G
    image = tl.load(IMAGE + g, mask=inside, other=-1).to(tl.int32)
    taken = image >= 0
    image = tl.where(taken, image, 0)
    place = tl.load(PLACE + g, mask=taken, other=0).to(tl.int32)
    height, width = tl.load(HEIGHT + image).to(tl.int32), tl.load(WIDTH + image).to(tl.int32)
    start = tl.load(START + image).to(tl.int32)
    time = tl.load(TIME + image)

    patches = width // PATCH
    row = (place // patches * PATCH)[:, None] + (inner // PATCH)[None, :]
    column = (place % patches * PATCH)[:, None] + (inner % PATCH)[None, :]
    offset = start[:, None] + (channel[None, :] * height[:, None] + row) * width[:, None] + column
    used = (feature < C)[None, :]
    x0 = tl.load(CELLS + offset, mask=taken[:, None] & used, other=0.0).to(tl.float32)
    # |x| < inf is false for NaN too; one such number makes the sum differ from C.
    real = taken & (tl.sum((tl.abs(x0) < float("inf")).to(tl.int32), 1) == CP)
    x0 = tl.where(real[:, None], x0, 0.0)
    eps = tl.randn(tl.load(SEED + image)[:, None], place[:, None] * C + feature[None, :])
    x_t = (1.0 - time)[:, None] * x0 + time[:, None] * eps

    to = g[:, None] * C + feature[None, :]
    kept = inside[:, None] & used
    tl.store(X_T + to, tl.where(real[:, None], x_t, 0.0).to(X_T.dtype.element_ty), mask=kept)
    tl.store(TARGET + to, tl.where(real[:, None], eps - x0, 0.0), mask=kept)
    tl.store(REAL + g, real, mask=inside)


@triton.jit(do_not_specialize=["G"])
def loss_and_gradient(
    V, TARGET, SEED, PLACE, WEIGHT, REF, REF_WEIGHT, TOTAL, MSE, DISTANCE, GRADIENT,
    G, v_stride, target_stride, ref_stride,
    KEYED: tl.constexpr, HAS_REF: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Losses [G] of ROWS rows, and GRADIENT [G, C] of their totals with respect to V.

    KEYED: TARGET holds x_0 and the velocity is eps - x_0; otherwise TARGET holds the velocity.
    """
    g = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    feature = tl.arange(0, CP)
    inside = g < G
    used = inside[:, None] & (feature < C)[None, :]
    v = tl.load(V + g[:, None] * v_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
    velocity = tl.load(TARGET + g[:, None] * target_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
    if KEYED:
        seed = tl.load(SEED + g, mask=inside, other=0)
        place = tl.load(PLACE + g, mask=inside, other=0).to(tl.int32)
        velocity = tl.randn(seed[:, None], place[:, None] * C + feature[None, :]) - velocity
    error = tl.where(used, v - velocity, 0.0)
    weight = tl.load(WEIGHT + g, mask=inside, other=0.0)
    mse = tl.sum(error * error, 1) / C
    total = mse * weight
    gradient = error * weight[:, None]
    if HAS_REF:
        ref = tl.load(REF + g[:, None] * ref_stride + feature[None, :], mask=used, other=0.0).to(tl.float32)
        error = tl.where(used, v - ref, 0.0)
        weight = tl.load(REF_WEIGHT + g, mask=inside, other=0.0)
        distance = tl.sum(error * error, 1) / C
        total += distance * weight
        gradient += error * weight[:, None]
        tl.store(DISTANCE + g, distance, mask=inside)
    tl.store(TOTAL + g, total, mask=inside)
    tl.store(MSE + g, mse, mask=inside)
    if HAS_GRADIENT:
        to = GRADIENT + g[:, None] * C + feature[None, :]
        tl.store(to, gradient * (2.0 / C), mask=used)


def noised_rows(
    images: LatentImages, image_G: Tensor, place_G: Tensor, dtype: torch.dtype = torch.float32
) -> NoisedRows:
    """`flow.noised_rows` in one pass. Raises ValueError where shapes, types or devices do not fit."""
    _check_images(images, image_G, place_G)
    if dtype not in FLOATS:
        raise ValueError(f"x_t is asked for as {dtype}, expected {' or '.join(map(str, FLOATS))}")
    return NoisedRows(
        *_noised_rows(
            images.cells, images.start_I, images.height_I, images.width_I, images.time_I, images.seed_I,
            image_G, place_G, images.channels, images.patch, dtype,
        )
    )  # fmt: skip


def _check_images(images: LatentImages, image_G: Tensor, place_G: Tensor) -> None:
    count, rows = images.start_I.shape, image_G.shape
    if not len(images.start_I):
        raise ValueError("images has 0 entries, expected at least 1: padding alone needs no kernel")
    check_dtype("cells", images.cells, *FLOATS)
    check_shape("cells", images.cells, (images.cells.numel(),))
    check_layout("cells", images.cells)
    indices = {"start_I": images.start_I, "height_I": images.height_I, "width_I": images.width_I}
    for name, x in indices.items():
        check_dtype(name, x, *INTEGERS)
    for name, x in {**indices, "time_I": images.time_I, "seed_I": images.seed_I}.items():
        check_shape(name, x, count)
        check_layout(name, x)
    check_dtype("time_I", images.time_I, torch.float32)
    check_dtype("seed_I", images.seed_I, torch.int64)
    for name, x in {"image_G": image_G, "place_G": place_G}.items():
        check_dtype(name, x, *INTEGERS)
        check_shape(name, x, rows)
        check_layout(name, x)
    if image_G.numel() * images.features >= OFFSET_LIMIT:
        raise ValueError(
            f"{image_G.numel()} rows of {images.features} numbers, expected less than {OFFSET_LIMIT} (2^31)"
        )
    check_device(
        images.cells, **indices, time_I=images.time_I, seed_I=images.seed_I, image_G=image_G, place_G=place_G
    )  # fmt: skip


@torch.library.custom_op("megabagel::noised_rows", mutates_args=())
def _noised_rows(
    cells: Tensor, start_I: Tensor, height_I: Tensor, width_I: Tensor, time_I: Tensor, seed_I: Tensor,
    image_G: Tensor, place_G: Tensor, channels: int, patch: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_launch(noise_patches, cells)
    rows, features = len(image_G), channels * patch**2
    x_t_GC, target_GC, real_G = _empty_rows(cells, rows, features, dtype)
    if rows:
        noise_patches[(triton.cdiv(rows, ROWS),)](
            cells, start_I, height_I, width_I, time_I, seed_I, image_G, place_G, x_t_GC, target_GC, real_G, rows,
            CHANNELS=channels, PATCH=patch, CP=triton.next_power_of_2(features), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return x_t_GC, target_GC, real_G


def _empty_rows(cells: Tensor, rows: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x_t_GC = cells.new_empty(rows, features, dtype=dtype)
    target_GC = cells.new_empty(rows, features, dtype=torch.float32)
    return x_t_GC, target_GC, cells.new_empty(rows, dtype=torch.bool)


@_noised_rows.register_fake
def _(cells: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, image_G, _, channels, patch, dtype = rest
    return _empty_rows(cells, image_G.shape[0], channels * patch**2, dtype)


def flow_losses(
    v_GC: Tensor, target: Tensor | KeyedTarget, weight_G: Tensor, reference: Reference | None = None
) -> FlowLosses:
    """`flow.flow_losses` and its gradient in one pass, differentiable in `v_GC`.

    The gradient is made with the losses and kept in fp32; backward scales its rows and rounds once. Raises ValueError
    where shapes, types, devices or strides do not fit.
    """
    keyed = target if isinstance(target, KeyedTarget) else None
    target_GC = target if isinstance(target, Tensor) else target.x0_GC
    seed_G, place_G = (keyed.seed_G, keyed.place_G) if keyed else (None, None)
    ref_GC, ref_weight_G = (reference.velocity_GC, reference.weight_G) if reference else (None, None)
    _check_loss(v_GC, target_GC, seed_G, place_G, weight_G, ref_GC, ref_weight_G)
    needs_gradient = v_GC.requires_grad and torch.is_grad_enabled()
    total_G, mse_G, distance_G, _ = _flow_losses(
        v_GC, target_GC, seed_G, place_G, weight_G, ref_GC, ref_weight_G, needs_gradient
    )
    return FlowLosses(total_G, mse_G, distance_G if reference else None)


def _check_loss(
    v_GC: Tensor, target_GC: Tensor, seed_G: Tensor | None, place_G: Tensor | None, weight_G: Tensor,
    ref_GC: Tensor | None, ref_weight_G: Tensor | None,
) -> None:  # fmt: skip
    if v_GC.ndim != 2:
        raise ValueError(f"v_GC has shape {tuple(v_GC.shape)}, expected two axes")
    for name, x in {"v_GC": v_GC, "target_GC": target_GC, "ref_GC": ref_GC}.items():
        if x is not None:
            check_shape(name, x, v_GC.shape)
            check_dtype(name, x, *FLOATS)
            check_layout(name, x)
    for name, x, types in (
        ("weight_G", weight_G, (torch.float32,)),
        ("ref_weight_G", ref_weight_G, (torch.float32,)),
        ("seed_G", seed_G, (torch.int64,)),
        ("place_G", place_G, INTEGERS),
    ):
        if x is not None:
            check_shape(name, x, v_GC.shape[:1])
            check_dtype(name, x, *types)
            check_layout(name, x)
    check_device(
        v_GC, target_GC=target_GC, seed_G=seed_G, place_G=place_G, weight_G=weight_G, ref_GC=ref_GC,
        ref_weight_G=ref_weight_G,
    )  # fmt: skip


@torch.library.custom_op("megabagel::flow_losses", mutates_args=())
def _flow_losses(
    v_GC: Tensor, target_GC: Tensor, seed_G: Tensor | None, place_G: Tensor | None, weight_G: Tensor,
    ref_GC: Tensor | None, ref_weight_G: Tensor | None, needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_launch(loss_and_gradient, v_GC)
    rows, features = v_GC.shape
    total_G, mse_G, distance_G, gradient_GC = _empty_losses(v_GC, ref_GC is not None, needs_gradient)
    if rows:
        loss_and_gradient[(triton.cdiv(rows, ROWS),)](
            v_GC, target_GC, seed_G, place_G, weight_G, ref_GC, ref_weight_G, total_G, mse_G, distance_G, gradient_GC,
            rows, v_GC.stride(0), target_GC.stride(0), 0 if ref_GC is None else ref_GC.stride(0),
            KEYED=seed_G is not None, HAS_REF=ref_GC is not None, HAS_GRADIENT=needs_gradient,
            C=features, CP=triton.next_power_of_2(features), ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
    return total_G, mse_G, distance_G, gradient_GC


def _empty_losses(v_GC: Tensor, has_ref: bool, needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, features = v_GC.shape
    total_G, mse_G = (v_GC.new_empty(rows, dtype=torch.float32) for _ in range(2))
    distance_G = v_GC.new_empty(rows if has_ref else 0, dtype=torch.float32)
    gradient_GC = v_GC.new_empty(rows if needs_gradient else 0, features, dtype=torch.float32)
    return total_G, mse_G, distance_G, gradient_GC


@_flow_losses.register_fake
def _(v_GC: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, ref_GC, _, needs_gradient = rest
    return _empty_losses(v_GC, ref_GC is not None, needs_gradient)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[3])


def _scale_gradient(ctx: Any, dtotal_G: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (gradient_GC,) = ctx.saved_tensors
    return (gradient_GC * dtotal_G[:, None]).to(ctx.dtype), *[None] * 7


_flow_losses.register_autograd(_scale_gradient, setup_context=_keep_gradient)
