"""Interface of the frozen image codec: `flux` (the FLUX VAE) or `blocks` (an 8x8 DCT that needs no weights)."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megabagel.config.schema import VaeConfig
from megabagel.errors import UserError
from megabagel.model.vae_blocks import BLOCK, KEPT, MEAN, STD, BlockCodec
from megabagel.model.vae_flux import FluxCodec, load_autoencoder

logger = logging.getLogger(__name__)


class Codec(Protocol):
    """Frozen encoder and decoder between pixels and the latents that the model generates; no gradient passes.

    A plain object, not an `nn.Module`: a module that holds one must not gain parameters by it.
    """

    channels: int
    """Latent channels."""
    downsample: int
    """Pixels per latent cell side."""

    moment_channels: int
    """Channels of `moments`."""

    def moments(self, pixels_B3hw: Tensor) -> Tensor:
        """Encode pixels to the parameters of the posterior: float32 [B, moment_channels, h, w] of latent cells.

        Means and log variances, or the latents themselves where the codec is deterministic. They depend on the image
        alone, so that they can be cached (`data.latents`).

        Args:
            pixels_B3hw: float32 in [-1, 1]; height and width are multiples of `downsample`.
        """
        ...

    def draw(self, moments_BChw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """Sample latents x_0 from the posterior: float32 [B, channels, h, w], normalized for the model.

        Args:
            moments_BChw: from `moments`.
            generator_seeds: one 64-bit seed per image for its posterior noise, so that the noise does not depend on
                the image's place in the batch. Ignored by a deterministic codec.
        """
        ...

    def encode(self, pixels_B3hw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """Return `draw(moments(pixels), generator_seeds)`."""
        ...

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Decode latents to pixels float32 [B, 3, h, w]: in [-1, 1] for latents of real images, not clamped."""
        ...


def build_codec(config: VaeConfig, device: torch.device | str = "cpu") -> Codec:
    """Build the codec of `model.vae` on `device` and log which one it is.

    Raises:
        UserError: `channels` or `downsample` are not those of the codec, or its weights are absent or do not fit.
    """
    if config.codec == "blocks":
        _expect_shape(config, BlockCodec.channels, BlockCodec.downsample)
        logger.info("image codec: blocks (8x8 DCT, 16 coefficients, no weights needed)")
        return BlockCodec(device)
    if config.path is None:
        raise UserError(
            "model.vae.path is not set, but model.vae.codec=flux needs the FLUX autoencoder's weights: set "
            "model.vae.path to ae.safetensors, or model.vae.codec=blocks, which needs none."
        )
    _expect_shape(config, config.channels, 2 ** (len(config.width_multipliers) - 1))
    codec = FluxCodec(config, load_autoencoder(config, device))
    logger.info("image codec: flux, weights from %s", config.path)
    return codec


def codec_fingerprint(config: VaeConfig) -> str:
    """Return an identifier of the codec: a hash of its weights or constants, by which latent caches are matched.

    Raises:
        UserError: the weights cannot be read.
    """
    if config.codec == "blocks":
        return f"blocks:{hashlib.sha256(repr((BLOCK, KEPT, MEAN, STD)).encode()).hexdigest()[:32]}"
    digest = hashlib.sha256()
    try:
        with Path(str(config.path)).open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    except OSError as error:
        raise UserError(f"model.vae.path={config.path} cannot be read ({error}); expected ae.safetensors") from error
    return f"flux:{digest.hexdigest()[:32]}"


def _expect_shape(config: VaeConfig, channels: int, downsample: int) -> None:
    """Raise UserError if the config's latent channels or downsampling factor are not those of its codec."""
    if (config.channels, config.downsample) != (channels, downsample):
        raise UserError(
            f"model.vae.channels={config.channels} and model.vae.downsample={config.downsample} do not fit "
            f"model.vae.codec={config.codec}, which makes {channels} channels at 1/{downsample} of the image's size: "
            f"set model.vae.channels={channels} and model.vae.downsample={downsample}."
        )
