"""Torch references of rectified flow on latent tokens (BAGEL section 2.1; bagel-reference section 9).

Legend: G latent tokens, C numbers of each.
"""

import torch


def noise_latents(x0_GC: torch.Tensor, eps_GC: torch.Tensor, t_G: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - t) x_0 + t eps, fp32 [G, C]."""
    t_G1 = t_G.float()[:, None]
    return (1 - t_G1) * x0_GC.float() + t_G1 * eps_GC.float()


def flow_loss_to_target(v_GC: torch.Tensor, target_GC: torch.Tensor, weight_G: torch.Tensor) -> torch.Tensor:
    """Per-token mean over C of (v - target)^2, times weight: fp32 [G]. The target is eps - x_0."""
    return (v_GC.float() - target_GC).square().mean(-1) * weight_G
