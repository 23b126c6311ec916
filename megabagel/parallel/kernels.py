"""Choice of the kernels for the operations between the linears (see `model.kernels`)."""

import logging

from megabagel_kernels.attention.configs import why_unavailable_here

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.model.kernels import TORCH, Kernels, triton_kernels
from megabagel.parallel.megatron import parameter_dtype
from megabagel.runtime.device import current_device

logger = logging.getLogger(__name__)


def choose_kernels(config: Config) -> Kernels:
    """Return the kernels of `parallel.kernels`, or for "auto" the best on this device; log them with the reason.

    "auto" takes Triton on a GPU that the table of kernel configurations lists, as the choice of the attention engine
    does, else torch.

    Raises:
        UserError: "triton" was asked for and cannot run on this machine.
    """
    name, why = config.parallel.kernels, "asked for"
    if name == "auto" and current_device().type != "cuda":
        name, why = "torch", "this is a CPU"
    elif name != "torch":
        lacking = why_unavailable_here(parameter_dtype(config), config.model.kv_channels)
        if lacking and name == "triton":
            raise UserError(f"parallel.kernels=triton: {lacking}. Or use auto, which takes torch there.")
        name, why = ("torch", lacking) if lacking else ("triton", why if name == "triton" else "kernels for this GPU")
    logger.info("kernels between the linears: %s (%s)", name, why)
    return triton_kernels() if name == "triton" else TORCH
