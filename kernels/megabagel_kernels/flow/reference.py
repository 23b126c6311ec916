"""Definition of noising and flow loss in torch; also the "torch" engine.

Letters: G gen rows (latent tokens), Z latent features of a token, I images.
"""

import torch
from torch import Tensor

from megabagel_kernels.flow.types import FlowLosses, KeyedTarget, LatentImages, NoisedRows, Reference
from megabagel_kernels.philox import noise_rows


def noised_rows(
    images: LatentImages, image_G: Tensor, patch_index_G: Tensor, dtype: torch.dtype = torch.float32
) -> NoisedRows:
    """See `functional.noised_rows`."""
    image_G, patch_index_G = image_G.long(), patch_index_G.long()
    padding_G = image_G < 0
    image_G, patch_index_G = image_G.clamp_min(0), torch.where(padding_G, 0, patch_index_G)
    x0_GZ = images.latents[_offsets(images, image_G, patch_index_G)]
    eps_GZ = noise_rows(images.seed_I[image_G], patch_index_G, images.features)
    return noised(x0_GZ, eps_GZ, images.time_I[image_G], ~padding_G, dtype)


def noised(
    x0_GZ: Tensor, eps_GZ: Tensor, t_G: Tensor, real_G: Tensor, dtype: torch.dtype = torch.float32
) -> NoisedRows:
    """`noised_rows` of given tokens and noise.

    Args:
        x0_GZ: [G, Z] clean latent tokens.
        eps_GZ: [G, Z] noise.
        t_G: [G] timesteps in [0, 1].
        real_G: [G] bool, false in padding rows.
        dtype: of x_t.
    """
    real_G = real_G & x0_GZ.isfinite().all(1)
    ends = noise_latents(x0_GZ, eps_GZ, t_G), eps_GZ.float() - x0_GZ.float()
    x_t_GZ, target_GZ = (torch.where(real_G[:, None], x, 0) for x in ends)
    return NoisedRows(x_t_GZ.to(dtype), target_GZ, real_G)


def _offsets(images: LatentImages, image_G: Tensor, patch_index_G: Tensor) -> Tensor:
    """[G, Z]: element offset in `images.latents` of each feature of each token; channels are fastest in a token."""
    height_G1, width_G1 = images.height_I[image_G][:, None].long(), images.width_I[image_G][:, None].long()
    feature_Z = torch.arange(images.features, device=image_G.device)
    channel_Z, inner_Z = feature_Z % images.channels, feature_Z // images.channels
    patches_G1 = width_G1 // images.patch
    row_GZ = patch_index_G[:, None] // patches_G1 * images.patch + inner_Z // images.patch
    column_GZ = patch_index_G[:, None] % patches_G1 * images.patch + inner_Z % images.patch
    return images.start_I[image_G][:, None] + (channel_Z * height_G1 + row_GZ) * width_G1 + column_GZ


def noise_latents(x0_GZ: Tensor, eps_GZ: Tensor, t_G: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps, fp32 [G, Z]: t = 0 is the image, t = 1 pure noise."""
    t_G1 = t_G.float()[:, None]
    return (1 - t_G1) * x0_GZ.float() + t_G1 * eps_GZ.float()


def flow_losses(
    v_GZ: Tensor, target: Tensor | KeyedTarget, weight_G: Tensor, reference: Reference | None = None
) -> FlowLosses:
    """See `functional.flow_losses`."""
    velocity_GZ = target.velocity() if isinstance(target, KeyedTarget) else target
    mse_G = _mean_square(v_GZ, velocity_GZ)
    total_G = mse_G * weight_G
    if reference is None:
        return FlowLosses(total_G, mse_G.detach(), None)
    distance_G = _mean_square(v_GZ, reference.velocity_GZ)
    return FlowLosses(total_G + distance_G * reference.weight_G, mse_G.detach(), distance_G.detach())


def _mean_square(a_GZ: Tensor, b_GZ: Tensor) -> Tensor:
    wide = torch.promote_types(a_GZ.dtype, torch.float32)
    return (a_GZ.to(wide) - b_GZ.to(wide)).square().mean(1)
