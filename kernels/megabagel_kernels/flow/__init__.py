"""Rectified flow on latent tokens (BAGEL section 2.1; https://arxiv.org/abs/2209.03003): noising and loss.

There is no torch.py: the definition in reference.py is a gather, a lerp and a mean square, of which a hand-written
version would save nothing, so it is the "torch" engine too.
"""

from megabagel_kernels.flow.functional import flow_losses, noised_rows
from megabagel_kernels.flow.reference import noise_latents, noised
from megabagel_kernels.flow.types import FlowLosses, KeyedTarget, LatentImages, NoisedRows, Reference

__all__ = [
    "FlowLosses",
    "KeyedTarget",
    "LatentImages",
    "NoisedRows",
    "Reference",
    "flow_losses",
    "noise_latents",
    "noised",
    "noised_rows",
]
