"""Noising of latent images and the rectified-flow loss.

Letters: G gen rows (latent tokens), Z latent features of a token, I images.
"""

import torch
from torch import Tensor

from megabagel_kernels.checks import (
    ANY_FLOAT,
    FLOATS,
    INTEGERS,
    OFFSET_LIMIT,
    Engine,
    check_axes,
    check_device,
    check_dtype,
    check_engine,
    check_layout,
    check_shape,
)
from megabagel_kernels.flow import reference as torch_engine
from megabagel_kernels.flow.types import FlowLosses, KeyedTarget, LatentImages, NoisedRows, Reference


def noised_rows(
    images: LatentImages,
    image_G: Tensor,
    patch_index_G: Tensor,
    dtype: torch.dtype = torch.float32,
    *,
    engine: Engine = "torch",
) -> NoisedRows:
    """Cut latents into tokens, draw their keyed noise, and mix both by the timestep of their image.

    A token's features are ordered row, column, channel of its patch, channel fastest. Its noise depends on the seed of
    its image and its patch index only, never on packing or rank.

    Args:
        images: latents, sizes, timesteps and seeds; at least one image.
        image_G: [G] which image a row shows; -1 in padding rows.
        patch_index_G: [G] row-major index of the patch within the image; any value in padding rows.
        dtype: of x_t.
        engine: "torch" or "triton", which does it in one pass.

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    _check_images(images, image_G, patch_index_G, engine)
    allowed = ANY_FLOAT if engine == "torch" else FLOATS
    if dtype not in allowed:
        raise ValueError(f"dtype of x_t is {dtype}, expected {' or '.join(map(str, allowed))}")
    if engine == "torch":
        return torch_engine.noised_rows(images, image_G, patch_index_G, dtype)
    from megabagel_kernels.flow import triton as triton_engine

    _check_images_for_triton(images, image_G, patch_index_G)
    return triton_engine.noised_rows(images, image_G, patch_index_G, dtype)


def flow_losses(
    v_GZ: Tensor,
    target: Tensor | KeyedTarget,
    weight_G: Tensor,
    reference: Reference | None = None,
    *,
    engine: Engine = "torch",
) -> FlowLosses:
    """Weighted squared error of predicted velocities and, optionally, squared distance to a frozen model's velocities.

    Args:
        v_GZ: [G, Z] prediction.
        target: velocity eps - x_0 [G, Z], or its parts.
        weight_G: [G] fp32; 0 for rows without loss.
        reference: velocities of a frozen model and their weights.
        engine: "torch" or "triton", which makes losses and gradient in one pass, keeps the gradient in fp32, and in
            backward scales and rounds it once.

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    check_engine(engine)
    keyed = target if isinstance(target, KeyedTarget) else None
    floats = ANY_FLOAT if engine == "torch" else FLOATS
    weights = (torch.float32, torch.float64) if engine == "torch" else (torch.float32,)
    matrices = {
        "v_GZ": v_GZ,
        "target_GZ": target if isinstance(target, Tensor) else target.x0_GZ,
        "reference velocity_GZ": reference.velocity_GZ if reference else None,
    }
    vectors: dict[str, tuple[Tensor | None, tuple[torch.dtype, ...]]] = {
        "weight_G": (weight_G, weights),
        "reference weight_G": (reference.weight_G if reference else None, weights),
        "seed_G": (keyed.seed_G if keyed else None, (torch.int64,)),
        "patch_index_G": (keyed.patch_index_G if keyed else None, INTEGERS),
    }
    check_axes("v_GZ", v_GZ, "G, Z")
    for name, x in matrices.items():
        _check_one(name, x, v_GZ, v_GZ.shape, floats, engine)
    for name, (x, dtypes) in vectors.items():
        _check_one(name, x, v_GZ, v_GZ.shape[:1], dtypes, engine)
    if engine == "torch":
        return torch_engine.flow_losses(v_GZ, target, weight_G, reference)
    from megabagel_kernels.flow import triton as triton_engine

    return triton_engine.flow_losses(v_GZ, target, weight_G, reference)


def _check_one(
    name: str, x: Tensor | None, like: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...], engine: Engine
) -> None:
    if x is None:
        return
    check_shape(name, x, shape)
    check_dtype(name, x, *dtypes)
    check_device(like, **{name: x})
    if engine == "triton":
        check_layout(name, x)


def _check_images(images: LatentImages, image_G: Tensor, patch_index_G: Tensor, engine: Engine) -> None:
    check_engine(engine)
    if not len(images.start_I):
        raise ValueError("images has 0 entries, expected at least 1")
    latents = images.latents
    check_axes("latents", latents, "elements")
    check_dtype("latents", latents, *(ANY_FLOAT if engine == "torch" else FLOATS))
    per_image = {name: getattr(images, name) for name in ("start_I", "height_I", "width_I", "time_I", "seed_I")}
    dtypes = {"time_I": (torch.float32,), "seed_I": (torch.int64,)}
    for name, x in per_image.items():
        check_shape(name, x, images.start_I.shape)
        check_dtype(name, x, *dtypes.get(name, INTEGERS))
    for name, x in (("image_G", image_G), ("patch_index_G", patch_index_G)):
        check_shape(name, x, image_G.shape)
        check_dtype(name, x, *INTEGERS)
    check_device(latents, **per_image, image_G=image_G, patch_index_G=patch_index_G)


def _check_images_for_triton(images: LatentImages, image_G: Tensor, patch_index_G: Tensor) -> None:
    for name in ("latents", "start_I", "height_I", "width_I", "time_I", "seed_I"):
        check_layout(name, getattr(images, name))
    for name, x in (("image_G", image_G), ("patch_index_G", patch_index_G)):
        check_layout(name, x)
    if image_G.numel() * images.features >= OFFSET_LIMIT:
        raise ValueError(
            f"{image_G.numel()} rows of {images.features} features, expected less than {OFFSET_LIMIT} (2^31) in all"
        )
