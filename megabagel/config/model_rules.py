"""Rules between fields: model sizes, their divisibility by parallel sizes, frozen parts, image codec.

The docstring of a rule is the reason in the error message (see `config.rules`).
"""

from collections.abc import Iterator
from pathlib import Path

from megabagel.config.rules import multiple_of, nearest_multiples, rule
from megabagel.config.schema import Config

# The language model


@rule("model.hidden", "model.heads", "model.head_dim")
def hidden_splits_into_heads(c: Config) -> Iterator[str]:
    """Without head_dim, hidden is split evenly over the heads."""
    if c.model.head_dim is None:
        yield from multiple_of(c, "model.hidden", "model.heads")


@rule("model.hidden", "model.heads", "model.head_dim")
def head_dim_is_even(c: Config) -> Iterator[str]:
    """RoPE turns one half of a head's channels against the other."""
    uneven_split = c.model.head_dim is None and c.model.hidden % c.model.heads
    if c.model.kv_channels % 2 and not uneven_split:
        yield f"A head has {c.model.kv_channels} channels; make that even."


@rule("model.heads", "model.kv_heads")
def query_heads_share_kv_heads(c: Config) -> Iterator[str]:
    """Every K/V head serves the same number of query heads."""
    yield from multiple_of(c, "model.heads", "model.kv_heads")


@rule("model.hidden")
def hidden_fits_position_tables(c: Config) -> Iterator[str]:
    """The 2-D position tables hold sines and cosines of rows and columns, so they need a multiple of 4."""
    if c.model.hidden % 4:
        yield f"Set model.hidden to {nearest_multiples(c.model.hidden, 4)}."


# Tensor and sequence parallel


@rule("model.kv_heads", "parallel.tp")
def heads_split_over_tp(c: Config) -> Iterator[str]:
    """Tensor parallel deals whole K/V heads, each with its share of model.heads."""
    yield from multiple_of(c, "model.kv_heads", "parallel.tp")


@rule("model.ffn", "parallel.tp")
def ffn_splits_over_tp(c: Config) -> Iterator[str]:
    """Tensor parallel splits the MLP evenly."""
    yield from multiple_of(c, "model.ffn", "parallel.tp")


@rule("model.vocab", "parallel.tp")
def vocab_splits_over_tp(c: Config) -> Iterator[str]:
    """Tensor parallel splits the word embedding and the head evenly."""
    yield from multiple_of(c, "model.vocab", "parallel.tp")


@rule("parallel.chunk", "parallel.tp", "parallel.sp")
def chunk_splits_over_tp(c: Config) -> Iterator[str]:
    """Sequence parallel splits each expert's rows, a multiple of chunk, over tp."""
    if c.parallel.sp:
        yield from multiple_of(c, "parallel.chunk", "parallel.tp")


# Pipeline and context parallel


@rule("parallel.vpp", "parallel.pp")
def interleaving_needs_a_pipeline(c: Config) -> Iterator[str]:
    """Model chunks are interleaved between pipeline ranks."""
    if c.parallel.vpp > 1 and c.parallel.pp == 1:
        yield "Set parallel.vpp to 1, or parallel.pp to 2 or more."


@rule("model.layers", "parallel.pp", "parallel.vpp", "parallel.layer_split")
def every_stage_has_a_layer(c: Config) -> Iterator[str]:
    """Without layer_split, each of the pp x vpp stages holds at least one layer."""
    stages = c.parallel.pp * c.parallel.vpp
    if c.parallel.layer_split is None and c.model.layers < stages:
        yield f"Set model.layers to {stages} or more, or lower pp or vpp."


@rule("model.layers", "parallel.pp", "parallel.vpp", "parallel.layer_split")
def layer_split_covers_the_model(c: Config) -> Iterator[str]:
    """The split lists the layers of each of the pp x vpp stages."""
    split, stages = c.parallel.layer_split, c.parallel.pp * c.parallel.vpp
    if split is not None and (len(split) != stages or sum(split) != c.model.layers):
        yield (
            f"Found {len(split)} numbers with sum {sum(split)}, expected {stages} with sum {c.model.layers}; "
            "mend the list or leave it out."
        )


@rule("parallel.chunk", "parallel.cp", "data.max_tokens")
def window_holds_a_chunk_per_rank(c: Config) -> Iterator[str]:
    """Context parallel deals whole chunks, at least one to each rank."""
    needed = c.parallel.chunk * c.parallel.cp
    if needed > c.data.max_tokens:
        yield f"Set data.max_tokens to {needed} or more, or lower chunk or cp."


# The ViT tower


@rule("model.vit.hidden", "model.vit.heads", "model.visual_und")
def vit_hidden_splits_into_heads(c: Config) -> Iterator[str]:
    """The ViT's hidden channels are split evenly over its heads."""
    if c.model.visual_und:
        yield from multiple_of(c, "model.vit.hidden", "model.vit.heads")


# What learns


@rule("train.freeze", "model.visual_und", "model.visual_gen")
def something_learns(c: Config) -> Iterator[str]:
    """At least one part of the model learns."""
    frozen = set(c.train.freeze)
    seeing = c.model.visual_und and "und" not in frozen and not {"vit", "connector"} <= frozen
    drawing = c.model.visual_gen and "latent" not in frozen
    if "llm" in frozen and not seeing and not drawing:
        yield "Everything that this model has is frozen; take a part out of train.freeze."


@rule("train.freeze")
def frozen_parts_differ(c: Config) -> Iterator[str]:
    """Every frozen part is listed once."""
    twice = {part for part in c.train.freeze if c.train.freeze.count(part) > 1}
    yield from (f"Remove the second {part}." for part in sorted(twice))


# The image codec


@rule("model.vae.codec", "model.vae.channels", "model.vae.downsample")
def blocks_codec_has_its_shape(c: Config) -> Iterator[str]:
    """The block transform keeps 16 numbers of every 8 x 8 pixels."""
    if c.model.vae.codec == "blocks" and (c.model.vae.channels, c.model.vae.downsample) != (16, 8):
        yield "Set channels to 16 and downsample to 8."


@rule("model.vae.codec", "model.vae.path")
def flux_codec_has_weights(c: Config) -> Iterator[str]:
    """Codec flux reads its weights from a file."""
    if c.model.vae.codec == "flux" and not (c.model.vae.path and Path(c.model.vae.path).is_file()):
        yield "Set model.vae.path to an existing ae.safetensors, or codec to blocks."


@rule("model.vae.codec", "model.vae.downsample", "model.vae.width_multipliers")
def flux_levels_make_downsample(c: Config) -> Iterator[str]:
    """Every level of codec flux but the last halves the sides."""
    levels = len(c.model.vae.width_multipliers)
    if c.model.vae.codec == "flux" and 2 * c.model.vae.downsample != 2**levels:
        yield f"Set downsample to 2 ** (levels - 1), with {levels} levels found, or change the number of multipliers."


@rule("model.vae.codec", "model.vae.width")
def flux_width_fits_group_norm(c: Config) -> Iterator[str]:
    """The norms of codec flux have 32 groups of channels."""
    if c.model.vae.codec == "flux" and c.model.vae.width % 32:
        yield f"Set model.vae.width to {nearest_multiples(c.model.vae.width, 32)}."
