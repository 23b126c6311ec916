"""Pictures in and out: resize rules, patches, latent tokens, and pixels as the released code rounds them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megabagel.config.schema import ResizeConfig
from megabagel.data.decode.contract import unit_range
from megabagel.data.decode.host import resample
from megabagel.data.decode.transforms import resize_target
from megabagel.model.vae import Codec
from megabagel.sequence.patches import patchify, unpatchify

Picture = str | Path | bytes | Image.Image
"""A file, its bytes, or an image in memory."""


def resized(image: Image.Image, rule: ResizeConfig, stride: int) -> Image.Image:
    """An RGB picture at the size that a visual branch sees; applying a rule twice changes nothing."""
    width, height = resize_target(*image.size, rule, stride)
    return resample(image, height, width)


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture as fp32 [3, height, width] in [-1, 1]."""
    return unit_range(torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous())


def patches_of(image: Image.Image, patch: int) -> Tensor:
    """ViT patches [rows * cols, 3 patch patch] of a picture whose sides are multiples of `patch`."""
    return patchify(to_pixels(image), patch)


def latent_tokens(latent_Chw: Tensor, patch: int) -> Tensor:
    """Latent tokens [rows * cols, Z] of a latent image."""
    return patchify(latent_Chw, patch)


def from_latent(
    tokens: Tensor, rows: int, cols: int, patch: int, codec: Codec, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Decode latent tokens to a picture, uint8 [height, width, 3].

    Levels are truncated, not rounded, as in the released code, so that its pictures can be reproduced.

    Args:
        tokens: [rows * cols, Z] latent tokens.
        rows: rows of latent tokens.
        cols: columns of latent tokens.
        patch: latent cells per side of a token.
        codec: image autoencoder.
        device: where the autoencoder is.
    """
    pixels = codec.decode(unpatchify(tokens, rows, cols, patch)[None].to(device))[0]
    return (pixels * 0.5 + 0.5).clamp(0, 1).mul(255).to(torch.uint8).permute(1, 2, 0).cpu().numpy()
