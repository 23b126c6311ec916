"""FLOP count of packs, from sizes alone, in two conventions (docs/bagel.md#flops).

official: as the released trainer reports it. 6 x parameters of one expert, embedding and head per token; attention by
the square of each sample's length, as if nothing were masked.
masked: the same, but attention counts exactly the visible (query, key) pairs.

Both cover forward plus backward of the language model. ViT and VAE are counted separately. Recomputed activations are
never counted.
"""

from dataclasses import dataclass

from megabagel.config.schema import ModelConfig, VaeConfig
from megabagel.sequence.pack import Pack
from megabagel.sequence.sizes import Size, pack_size

TRAIN = 3
"""Cost of forward plus backward in units of one forward pass."""

ATTENTION_SPEED, VIT_SPEED, VAE_SPEED = 0.5, 0.7, 0.4
"""Assumed FLOP/s of masked attention, ViT and VAE, relative to the language model's matrix products (not measured).
They only balance packs over data-parallel ranks; no result of training depends on them."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations of one or more packs (a multiply-add counts as two). `+` adds field by field."""

    official: float = 0.0
    masked: float = 0.0
    vit: float = 0.0
    vae: float = 0.0
    """Image encoding, forward only: the codec is frozen."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.official + other.official, self.masked + other.masked, self.vit + other.vit, self.vae + other.vae
        )


def branch_parameters(model: ModelConfig) -> int:
    """Return the number of weights that one token passes through: all layers of one expert, and the final norm."""
    width, head = model.hidden, model.kv_channels
    query, key = model.heads * head, model.kv_heads * head
    attention = width * (query + 2 * key) + query * width
    biases = (query + 2 * key) * model.qkv_bias + 2 * head * model.qk_norm
    return model.layers * (attention + biases + 3 * width * model.ffn + 2 * width) + width


def count_flops(size: Size, model: ModelConfig) -> Flops:
    """Return the FLOPs of forward and backward on the pack, or the sum of packs, that `size` describes."""
    dense = 2 * TRAIN * (branch_parameters(model) + 2 * model.vocab * model.hidden) * size.tokens
    per_pair = 4 * TRAIN * model.heads * model.kv_channels * model.layers
    pixels = model.latent_stride**2
    vae = vae_flops(model.vae, pixels * size.encoded, pixels**2 * size.encoded_squares)
    return Flops(dense + per_pair * size.squares, dense + per_pair * size.visible, _vit_flops(size, model), vae)


def relative_time(size: Size, model: ModelConfig) -> float:
    """Estimate the part of a pack's time that differs between packs, in FLOPs at the speed of the layers' GEMMs.

    Used to balance packs over data-parallel ranks. Counts attention, the head on rows with cross-entropy, ViT and VAE.
    """
    # The layers' own GEMMs are left out: they run on all rows of the layout, padding included, and so take the same
    # time for every pack.
    flops = count_flops(size, model)
    attention = 4 * TRAIN * model.heads * model.kv_channels * model.layers * size.visible
    head = 2 * TRAIN * model.vocab * model.hidden * size.ce_tokens
    return head + attention / ATTENTION_SPEED + flops.vit / VIT_SPEED + flops.vae / VAE_SPEED


def needed_flops(pack: Pack, model: ModelConfig) -> float:
    """Return the FLOPs of matrix products that a training step on `pack` cannot avoid, to compare with a GEMM rate."""
    # `masked` charges embedding and head (two times V x D) to every token, as the official convention does. An
    # embedding lookup is no matrix product, and the head runs on rows with cross-entropy only.
    flops, of_head = count_flops(pack_size(pack), model), 2 * TRAIN * model.vocab * model.hidden
    return flops.masked + flops.vit - of_head * (2 * pack.tokens - pack.ce_tokens)


def _vit_flops(size: Size, model: ModelConfig) -> float:
    """Return the FLOPs of ViT and connector, forward and backward, with full attention inside each image."""
    vit = model.vit
    layer = 4 * vit.hidden**2 + 2 * vit.hidden * vit.ffn
    weights = 3 * vit.patch**2 * vit.hidden + vit.layers * layer + (vit.hidden + model.hidden) * model.hidden
    return float(TRAIN * (2 * weights * size.patches + 4 * vit.hidden * vit.layers * size.patch_squares))


def vae_flops(vae: VaeConfig, pixels: int, squares: int) -> float:
    """Return the FLOPs of encoding images: convolutions and mid-block attention of the FLUX encoder, or the DCT.

    Args:
        vae: the codec and its widths.
        pixels: number of pixels of all images together.
        squares: sum over images of the square of their number of pixels.
    """
    if vae.codec == "blocks":
        # The DCT is separable: two passes of 8 multiply-adds per pixel over three channels.
        return 3 * 2 * 2 * vae.downsample * float(pixels)
    widths = [vae.width * multiplier for multiplier in vae.width_multipliers]
    # `total` counts multiply-adds; the return value doubles it.
    total, before = 9 * 3 * vae.width * pixels, vae.width
    for level, width in enumerate(widths):
        shortcut = before * width if before != width else 0
        blocks = 9 * (before + width) * width + shortcut + (vae.res_blocks - 1) * 18 * width**2
        total += blocks * pixels
        if level + 1 < len(widths):
            pixels, squares = pixels // 4, squares // 16
            total += 9 * width**2 * pixels
        before = width
    middle = 2 * 18 * before**2 + 4 * before**2
    return 2.0 * (total + (middle + 9 * before * 2 * vae.channels) * pixels + 2 * before * squares)
