"""FLOP count of packs, from sizes alone, in the two conventions in use.

official: what the released trainer reports (docs/bagel.md#flops): 6 x parameters of one branch, embedding and
head per token, attention by the square of each sample's length, no credit for the mask.
masked-pair: the same, attention by exactly visible (query, key) pairs.
Both are forward plus backward of the language model. ViT and VAE work is counted beside them; recompute never is.
"""

from dataclasses import dataclass

from megabagel.config.schema import ModelConfig, VaeConfig
from megabagel.sequence.pack import Pack
from megabagel.sequence.sizes import Size, pack_size

TRAIN = 3
"""Forward plus backward, in forwards."""

ATTENTION_SPEED, VIT_SPEED, VAE_SPEED = 0.5, 0.7, 0.4
"""Assumed FLOP/s of masked attention, the tower and the codec as shares of the language model's matrix products.
They decide which rank runs a pack, never what it computes."""


@dataclass(frozen=True)
class Flops:
    """Floating point operations (a multiply-add is two) of one or more packs; adds up with `+`."""

    official: float = 0.0
    masked: float = 0.0
    vit: float = 0.0
    vae: float = 0.0
    """Encoding, forward only: the codec is frozen."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.official + other.official, self.masked + other.masked, self.vit + other.vit, self.vae + other.vae
        )


def branch_parameters(model: ModelConfig) -> int:
    """Weights that one token meets in all layers: one expert with its norms and biases, and the final norm."""
    width, head = model.hidden, model.kv_channels
    query, key = model.heads * head, model.kv_heads * head
    attention = width * (query + 2 * key) + query * width
    biases = (query + 2 * key) * model.qkv_bias + 2 * head * model.qk_norm
    return model.layers * (attention + biases + 3 * width * model.ffn + 2 * width) + width


def count_flops(size: Size, model: ModelConfig) -> Flops:
    """FLOPs of one training step on one pack, or on all that `size` sums up."""
    dense = 2 * TRAIN * (branch_parameters(model) + 2 * model.vocab * model.hidden) * size.tokens
    per_pair = 4 * TRAIN * model.heads * model.kv_channels * model.layers
    pixels = model.latent_stride**2
    vae = vae_flops(model.vae, pixels * size.encoded, pixels**2 * size.encoded_squares)
    return Flops(dense + per_pair * size.squares, dense + per_pair * size.visible, _vit_flops(size, model), vae)


def relative_time(size: Size, model: ModelConfig) -> float:
    """Estimated time of a pack beyond what every pack takes, to balance ranks by, in FLOPs of matrix products.

    The layers' matrix products run on all rows of the layout, padding included, so they do not tell packs apart; what
    does is attention, the head on rows with cross-entropy, the ViT tower and the codec.
    """
    flops = count_flops(size, model)
    attention = 4 * TRAIN * model.heads * model.kv_channels * model.layers * size.visible
    head = 2 * TRAIN * model.vocab * model.hidden * size.ce_tokens
    return head + attention / ATTENTION_SPEED + flops.vit / VIT_SPEED + flops.vae / VAE_SPEED


def needed_flops(pack: Pack, model: ModelConfig) -> float:
    """Matrix products that a training step on one pack cannot do without: `masked` and `vit`, but the head on rows with
    cross-entropy alone and no products for the word embedding. To set beside a machine's matmul rate."""
    flops, of_head = count_flops(pack_size(pack), model), 2 * TRAIN * model.vocab * model.hidden
    return flops.masked + flops.vit - of_head * (2 * pack.tokens - pack.ce_tokens)


def _vit_flops(size: Size, model: ModelConfig) -> float:
    """Tower and connector, forward and backward; full attention inside each image."""
    vit = model.vit
    layer = 4 * vit.hidden**2 + 2 * vit.hidden * vit.ffn
    weights = 3 * vit.patch**2 * vit.hidden + vit.layers * layer + (vit.hidden + model.hidden) * model.hidden
    return float(TRAIN * (2 * weights * size.patches + 4 * vit.hidden * vit.layers * size.patch_squares))


def vae_flops(vae: VaeConfig, pixels: int, squares: int) -> float:
    """Encoding images: convolutions and the middle attention of the FLUX encoder, or the DCT.

    pixels: of all images. squares: the pixels of each image squared, summed.
    """
    if vae.codec == "blocks":
        return 3 * 2 * 2 * vae.downsample * float(pixels)  # two passes of 8 multiply-adds over three channels
    widths = [vae.width * multiplier for multiplier in vae.width_multipliers]
    total, before = 9 * 3 * vae.width * pixels, vae.width  # multiply-adds
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
