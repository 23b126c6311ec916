"""The frozen image codec behind one interface: `blocks` (training-free, exact) or `flux` (the FLUX autoencoder)."""

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
    """Pixels to the latents that the model generates, and back. Frozen: no gradient passes.

    Codecs are plain objects, not modules, so that a model which holds one gains no parameters by it.
    """

    channels: int
    downsample: int
    """Pixels per latent side."""

    moment_channels: int
    """M, channels of `moments`."""

    def moments(self, pixels_B3hw: Tensor) -> Tensor:
        """All that is known of an image's latents before any draw: [B, C, h / downsample, w / downsample] float32.

        Pixels are float32 in [-1, 1]; H and W are multiples of `downsample`. Means and log variances of the posterior,
        or the latents themselves where it is a point. They depend on the image alone, so they can be computed once.
        """
        ...

    def draw(self, moments_BChw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """Latents x_0 [B, C, h / downsample, w / downsample] float32, normalised as the model sees them.

        Image i draws its posterior noise, if the codec has any, from `generator_seeds[i]` (any integer of 64 bits),
        never from its place in the batch.
        """
        ...

    def encode(self, pixels_B3hw: Tensor, generator_seeds: Sequence[int]) -> Tensor:
        """`draw` from the `moments` of pixels."""
        ...

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Pixels [B, 3, h, w] float32, [-1, 1] for latents of real images; not clamped."""
        ...


def build_codec(config: VaeConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec that `model.vae` names, on `device`. Says in the log which one it is.

    Raises UserError when the shape asked for is not that of the codec, or its weights are absent or do not fit.
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
    """What the moments of an image depend on beside its pixels: equal codecs have equal fingerprints.

    Raises UserError when the weights cannot be read.
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
    """Refuse a config whose latents are not those that its codec makes."""
    if (config.channels, config.downsample) != (channels, downsample):
        raise UserError(
            f"model.vae.channels={config.channels} and model.vae.downsample={config.downsample} do not fit "
            f"model.vae.codec={config.codec}, which makes {channels} channels at 1/{downsample} of the image's size: "
            f"set model.vae.channels={channels} and model.vae.downsample={downsample}."
        )
