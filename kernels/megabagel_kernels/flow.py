"""Torch references of rectified flow on latent tokens (BAGEL section 2; docs/bagel.md#flow-time).

Letters: G rows of latent tokens, C numbers of each, I images.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megabagel_kernels.philox import noise_rows


@dataclass(frozen=True)
class LatentImages:
    """Latents of several images in one buffer, and how each is noised.

    One image may stand here several times, noised and clean. All index tensors are int32 or int64.
    """

    cells: Tensor
    """Flat buffer; image i is [channels, height_I[i], width_I[i]], dense, from element start_I[i] on."""
    start_I: Tensor
    height_I: Tensor
    """Cells, a multiple of `patch`; likewise the width."""
    width_I: Tensor
    time_I: Tensor
    """fp32 timestep in [0, 1]; 0 leaves an image as it is."""
    seed_I: Tensor
    """int64 seed of the image's noise, any value."""
    channels: int
    patch: int

    @property
    def features(self) -> int:
        """C, the numbers of one token."""
        return self.channels * self.patch**2


class NoisedRows(NamedTuple):
    """Latent tokens by row; zeros in rows that are not real."""

    x_t_GC: Tensor
    """fp32 or as asked for: (1 - t) x_0 + t eps."""
    target_GC: Tensor
    """fp32: the velocity eps - x_0."""
    real_G: Tensor
    """bool: false in padding, and where an image is lost (has a number that is not finite)."""


@dataclass(frozen=True)
class KeyedTarget:
    """The velocity eps - x_0 [G, C] by its parts; the noise is `philox.noise_rows(seed_G, place_G, C)`."""

    x0_GC: Tensor
    seed_G: Tensor
    """int64."""
    place_G: Tensor
    """int32 or int64, less than 2^31 / C: the patch's number inside its image."""

    def velocity(self) -> Tensor:
        """fp32 [G, C]."""
        return noise_rows(self.seed_G, self.place_G.long(), self.x0_GC.shape[1]) - self.x0_GC.float()


@dataclass(frozen=True)
class Reference:
    """A frozen model's velocity [G, C] that holds the trained one, and how strongly: lambda_c of SRUM, fp32 [G]."""

    velocity_GC: Tensor
    weight_G: Tensor


class FlowLosses(NamedTuple):
    """fp32 [G] each; `total_G` alone has a gradient."""

    total_G: Tensor
    """weight * mse + reference weight * distance."""
    mse_G: Tensor
    """Mean over C of (v - (eps - x_0))^2, not weighted: for the log."""
    distance_G: Tensor | None
    """Mean over C of (v - reference)^2, not weighted; None without a reference."""


def noised_rows(
    images: LatentImages, image_G: Tensor, place_G: Tensor, dtype: torch.dtype = torch.float32
) -> NoisedRows:
    """Rows of noised latent tokens: row g is patch place_G[g] (row-major) of image image_G[g], or padding where -1.

    A token is ordered row, column, channel of its patch, channel fastest. `dtype` is that of x_t.
    """
    image_G, place_G = image_G.long(), place_G.long()
    padding_G = image_G < 0
    image_G, place_G = image_G.clamp_min(0), torch.where(padding_G, 0, place_G)
    x0_GC = images.cells[_cell_offsets(images, image_G, place_G)]
    eps_GC = noise_rows(images.seed_I[image_G], place_G, images.features)
    return noised(x0_GC, eps_GC, images.time_I[image_G], ~padding_G, dtype)


def noised(
    x0_GC: Tensor, eps_GC: Tensor, t_G: Tensor, real_G: Tensor, dtype: torch.dtype = torch.float32
) -> NoisedRows:
    """`noised_rows` of tokens and noise that are at hand."""
    real_G = real_G & x0_GC.isfinite().all(1)
    ends = noise_latents(x0_GC, eps_GC, t_G), eps_GC.float() - x0_GC.float()
    x_t_GC, target_GC = (torch.where(real_G[:, None], x, 0) for x in ends)
    return NoisedRows(x_t_GC.to(dtype), target_GC, real_G)


def _cell_offsets(images: LatentImages, image_G: Tensor, place_G: Tensor) -> Tensor:
    """[G, C]: where in `images.cells` each number of each token lies."""
    height_G1, width_G1 = images.height_I[image_G][:, None].long(), images.width_I[image_G][:, None].long()
    feature_C = torch.arange(images.features, device=image_G.device)
    channel_C, inner_C = feature_C % images.channels, feature_C // images.channels
    patches_G1 = width_G1 // images.patch
    row_GC = place_G[:, None] // patches_G1 * images.patch + inner_C // images.patch
    column_GC = place_G[:, None] % patches_G1 * images.patch + inner_C % images.patch
    return images.start_I[image_G][:, None] + (channel_C * height_G1 + row_GC) * width_G1 + column_GC


def noise_latents(x0_GC: Tensor, eps_GC: Tensor, t_G: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps, fp32 [G, C]."""
    t_G1 = t_G.float()[:, None]
    return (1 - t_G1) * x0_GC.float() + t_G1 * eps_GC.float()


def flow_losses(
    v_GC: Tensor, target: Tensor | KeyedTarget, weight_G: Tensor, reference: Reference | None = None
) -> FlowLosses:
    """Losses of predicted velocities: to `target` (a velocity, or its parts) and, optionally, to a frozen reference.

    `weight_G` carries the timestep's weight, or alpha * R of SRUM's reward map; 0 for rows without loss.
    """
    velocity_GC = target.velocity() if isinstance(target, KeyedTarget) else target
    mse_G = _mean_square(v_GC, velocity_GC)
    total_G = mse_G * weight_G
    if reference is None:
        return FlowLosses(total_G, mse_G.detach(), None)
    distance_G = _mean_square(v_GC, reference.velocity_GC)
    return FlowLosses(total_G + distance_G * reference.weight_G, mse_G.detach(), distance_G.detach())


def _mean_square(a_GC: Tensor, b_GC: Tensor) -> Tensor:
    wide = torch.promote_types(a_GC.dtype, torch.float32)
    return (a_GC.to(wide) - b_GC.to(wide)).square().mean(1)


def flow_loss(v_GC: Tensor, x0_GC: Tensor, eps_GC: Tensor, weight_G: Tensor) -> Tensor:
    """Per-token mean over C of (v - (eps - x_0))^2, times weight: fp32 [G]."""
    return flow_loss_to_target(v_GC, eps_GC.float() - x0_GC.float(), weight_G)


def flow_loss_to_target(v_GC: Tensor, target_GC: Tensor, weight_G: Tensor) -> Tensor:
    """`flow_loss` where the velocity eps - x_0 is at hand: fp32 [G]."""
    return (v_GC.float() - target_GC.float()).square().mean(1) * weight_G.float()
