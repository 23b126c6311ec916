"""Arguments and results of the rectified-flow operations.

Letters: G gen rows (latent tokens), Z latent features of a token, I images.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megabagel_kernels.philox import noise_rows


@dataclass(frozen=True)
class LatentImages:
    """Latents of several images in one buffer, and how each is noised.

    An image may be listed several times, for example noised and clean. Index tensors are int32 or int64.
    """

    latents: Tensor
    """Flat buffer; image i is [channels, height_I[i], width_I[i]], contiguous, from element start_I[i] on."""
    start_I: Tensor
    height_I: Tensor
    """Latent pixels, a multiple of `patch`; likewise the width."""
    width_I: Tensor
    time_I: Tensor
    """fp32 timestep in [0, 1]; an image with timestep 0 stays as it is."""
    seed_I: Tensor
    """int64 seed of the image's noise, any value."""
    channels: int
    """Of the VAE's latent space."""
    patch: int
    """Side of the square of latent pixels that makes one token."""

    @property
    def features(self) -> int:
        """Z, the latent features of one token."""
        return self.channels * self.patch**2


class NoisedRows(NamedTuple):
    """Noised latent tokens by row; rows that are not real are zero."""

    x_t_GZ: Tensor
    """(1 - t) x_0 + t eps, in the dtype asked for."""
    target_GZ: Tensor
    """fp32: the velocity eps - x_0."""
    real_G: Tensor
    """bool: false in padding rows, and in tokens that hold a latent which is not finite."""


@dataclass(frozen=True)
class KeyedTarget:
    """The velocity eps - x_0 [G, Z] by its parts; the noise is `philox.noise_rows(seed_G, patch_index_G, Z)`.

    For callers that have x_0 at hand: the loss kernel draws the noise again instead of reading a stored velocity.
    """

    x0_GZ: Tensor
    seed_G: Tensor
    """int64."""
    patch_index_G: Tensor
    """int32 or int64, less than 2^31 / Z: row-major index of the token's patch within its image."""

    def velocity(self) -> Tensor:
        """fp32 [G, Z]."""
        return noise_rows(self.seed_G, self.patch_index_G.long(), self.x0_GZ.shape[1]) - self.x0_GZ.float()


@dataclass(frozen=True)
class Reference:
    """A second velocity that the prediction is pulled towards, with weights of its own.

    The velocity eps - x_0' of another picture (SRUM's constraint, equation 2, where good and bad picture differ), or
    that of a frozen model (the velocity penalty of flow-matching RL).
    """

    velocity_GZ: Tensor
    weight_G: Tensor
    """fp32 weight of the squared distance to it."""


class FlowLosses(NamedTuple):
    """Losses per row, fp32 [G] each (fp64 for fp64); only `total_G` has a gradient."""

    total_G: Tensor
    """weight * mse + reference weight * distance."""
    mse_G: Tensor
    """Mean over Z of (v - (eps - x_0))^2, unweighted: for the log."""
    distance_G: Tensor | None
    """Mean over Z of (v - reference)^2, unweighted; None without a reference."""
