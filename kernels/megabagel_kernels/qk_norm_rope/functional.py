"""QK-norm + RoPE of one Mixture-of-Transformers layer: separate und and gen rows in, [und | gen] rows out.

The two inputs are outputs of two linears (one per expert), the result is what attention reads. The join is part of the
operation, so the Triton engine writes both experts' rows to their final place: concatenating first would copy queries
and keys once more per layer, and keep the copies for backward.

Letters: U und rows, G gen rows, T = U + G; N heads, H head dim.
"""

import torch
from torch import Tensor

from megabagel_kernels.checks import (
    ANY_FLOAT,
    FLOATS,
    Engine,
    check_device,
    check_dtype,
    check_engine,
    check_layout,
    check_shape,
)
from megabagel_kernels.qk_norm_rope import torch as torch_engine


def qk_norm_rope(
    und_UNH: Tensor,
    gen_GNH: Tensor,
    gamma_und_H: Tensor | None,
    gamma_gen_H: Tensor | None,
    cos_TH: Tensor,
    sin_TH: Tensor,
    eps: float,
    *,
    engine: Engine = "torch",
) -> Tensor:
    """RMSNorm of every head with the gamma of its row's expert, then rotation by its row's angles.

    Args:
        und_UNH: [U, N, H] queries or keys of the understanding expert. With "triton" rows may have any stride, as
            slices of a fused QKV projection have; heads and channels are contiguous.
        gen_GNH: [G, N, H] of the generation expert, in the same dtype.
        gamma_und_H: [H] norm weight of the understanding expert; None for models without QK-norm.
        gamma_gen_H: [H] norm weight of the generation expert; None as `gamma_und_H`.
        cos_TH: [T, H] fp32 cosines, one row per und row and then per gen row; both halves of a row are equal.
        sin_TH: [T, H] fp32 sines.
        eps: added to the mean square.
        engine: "torch" or "triton". Without QK-norm both rotate in plain torch: there is no kernel for it, because no
            released BAGEL model lacks QK-norm.

    Returns:
        [T, N, H], contiguous, in the dtype of the inputs.

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    _check(und_UNH, gen_GNH, cos_TH, sin_TH, engine)
    if gamma_und_H is None or gamma_gen_H is None:
        return torch_engine.qk_norm_rope(und_UNH, gen_GNH, None, None, cos_TH, sin_TH, eps)
    for name, gamma_H in (("gamma_und_H", gamma_und_H), ("gamma_gen_H", gamma_gen_H)):
        check_shape(name, gamma_H, und_UNH.shape[2:])
        check_dtype(name, gamma_H, *(ANY_FLOAT if engine == "torch" else FLOATS))
        check_layout(name, gamma_H)
    check_device(und_UNH, gamma_und_H=gamma_und_H, gamma_gen_H=gamma_gen_H)
    if engine == "torch":
        return torch_engine.qk_norm_rope(und_UNH, gen_GNH, gamma_und_H, gamma_gen_H, cos_TH, sin_TH, eps)
    from megabagel_kernels.qk_norm_rope import triton as triton_engine

    _check_for_triton(und_UNH, gen_GNH, cos_TH, sin_TH)
    return triton_engine.qk_norm_rope(und_UNH, gen_GNH, gamma_und_H, gamma_gen_H, cos_TH, sin_TH, eps)


def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotate channel i against channel i + H / 2 of every head, in fp32; result in the dtype of x. Plain torch.

    cos_TH and sin_TH are [T, H] tables, one row per row of x; both halves of a row are equal.
    """
    return torch_engine.apply_rope(x_TNH, cos_TH, sin_TH)


def _check(und_UNH: Tensor, gen_GNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, engine: Engine) -> None:
    check_engine(engine)
    if und_UNH.ndim != 3 or und_UNH.shape[2] % 2:
        raise ValueError(f"und_UNH has shape {tuple(und_UNH.shape)}, expected [U, N, H] with an even H")
    check_shape("gen_GNH", gen_GNH, (gen_GNH.shape[0], *und_UNH.shape[1:]))
    check_dtype("und_UNH", und_UNH, *(ANY_FLOAT if engine == "torch" else FLOATS))
    check_dtype("gen_GNH", gen_GNH, und_UNH.dtype)
    for name, table_TH in (("cos_TH", cos_TH), ("sin_TH", sin_TH)):
        check_shape(name, table_TH, (len(und_UNH) + len(gen_GNH), und_UNH.shape[2]))
    check_device(und_UNH, gen_GNH=gen_GNH, cos_TH=cos_TH, sin_TH=sin_TH)


def _check_for_triton(und_UNH: Tensor, gen_GNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> None:
    for name, x in (("und_UNH", und_UNH), ("gen_GNH", gen_GNH)):
        check_layout(name, x, inner=2)
    for name, table_TH in (("cos_TH", cos_TH), ("sin_TH", sin_TH)):
        check_dtype(name, table_TH, torch.float32)
        check_layout(name, table_TH)
    if cos_TH.stride(0) != sin_TH.stride(0):
        raise ValueError(f"cos_TH has row stride {cos_TH.stride(0)}, sin_TH {sin_TH.stride(0)}, expected the same")
