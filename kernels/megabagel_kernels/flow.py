"""Torch references of rectified flow on latent tokens (BAGEL section 2.1; bagel-reference section 9).

Letters: G latent tokens, C numbers of each.
"""

from torch import Tensor


def noise_latents(x0_GC: Tensor, eps_GC: Tensor, t_G: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps, fp32 [G, C]."""
    t_G1 = t_G.float()[:, None]
    return (1 - t_G1) * x0_GC.float() + t_G1 * eps_GC.float()


def flow_loss(v_GC: Tensor, x0_GC: Tensor, eps_GC: Tensor, weight_G: Tensor) -> Tensor:
    """Per-token mean over C of (v - (eps - x_0))^2, times weight: fp32 [G]."""
    return flow_loss_to_target(v_GC, eps_GC.float() - x0_GC.float(), weight_G)


def flow_loss_to_target(v_GC: Tensor, target_GC: Tensor, weight_G: Tensor) -> Tensor:
    """`flow_loss` where the velocity eps - x_0 is at hand: fp32 [G]."""
    return (v_GC.float() - target_GC.float()).square().mean(1) * weight_G.float()
