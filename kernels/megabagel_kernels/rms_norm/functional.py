"""RMSNorm of one block of rows that share a gamma. A Mixture-of-Transformers layer calls it once per expert.

Letters: T rows, D width.
"""

from torch import Tensor

from megabagel_kernels.checks import (
    ANY_FLOAT,
    FLOATS,
    Engine,
    check_axes,
    check_device,
    check_dtype,
    check_engine,
    check_layout,
    check_shape,
)
from megabagel_kernels.rms_norm import torch as torch_engine


def rms_norm(x_TD: Tensor, gamma_D: Tensor, eps: float, *, engine: Engine = "torch") -> Tensor:
    """RMSNorm over the last axis.

    Args:
        x_TD: [T, D]; with "triton" rows may have any stride, their elements are contiguous.
        gamma_D: [D] weight.
        eps: added to the mean square.
        engine: "torch" or "triton".

    Returns:
        [T, D] in the dtype of x, rounded before and after the multiplication with gamma.

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    _check(x_TD, gamma_D, engine)
    if engine == "torch":
        return torch_engine.rms_norm(x_TD, gamma_D, eps)
    from megabagel_kernels.rms_norm import triton as triton_engine

    return triton_engine.rms_norm(x_TD, gamma_D, eps)


def add_rms_norm(
    residual_TD: Tensor, x_TD: Tensor, gamma_D: Tensor, eps: float, *, engine: Engine = "torch"
) -> tuple[Tensor, Tensor]:
    """Residual add and RMSNorm of the sum; "triton" makes one pass over memory each way.

    Args:
        residual_TD: [T, D] residual stream.
        x_TD: [T, D] output of the block before, in the dtype of the residual.
        gamma_D: [D] weight.
        eps: added to the mean square.
        engine: "torch" or "triton".

    Returns:
        (residual + x, its RMSNorm), both [T, D].

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    _check(x_TD, gamma_D, engine)
    check_shape("residual_TD", residual_TD, x_TD.shape)
    check_dtype("residual_TD", residual_TD, x_TD.dtype)
    check_device(x_TD, residual_TD=residual_TD)
    if engine == "torch":
        return torch_engine.add_rms_norm(residual_TD, x_TD, gamma_D, eps)
    from megabagel_kernels.rms_norm import triton as triton_engine

    check_layout("residual_TD", residual_TD)
    return triton_engine.add_rms_norm(residual_TD, x_TD, gamma_D, eps)


def _check(x_TD: Tensor, gamma_D: Tensor, engine: Engine) -> None:
    check_engine(engine)
    check_axes("x_TD", x_TD, "T, D")
    check_shape("gamma_D", gamma_D, x_TD.shape[1:])
    allowed = ANY_FLOAT if engine == "torch" else FLOATS
    check_dtype("x_TD", x_TD, *allowed)
    check_dtype("gamma_D", gamma_D, *allowed)
    check_device(x_TD, gamma_D=gamma_D)
    if engine == "triton":
        check_layout("x_TD", x_TD)
        check_layout("gamma_D", gamma_D)
