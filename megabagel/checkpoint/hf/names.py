"""The names of the published checkpoint for the tensors of our model, one for one (docs/bagel.md#tensor-names)."""

import re
from collections.abc import Iterator

from megabagel.config.schema import ModelConfig
from megabagel.model.shapes_only import model_shapes

TOWER, LLM = "vit_model.vision_model.", "language_model.model."
TWIN = {"und": "", "gen": "_moe_gen"}
"""How the published names tell the experts apart."""

MODULES = (
    (r"embed\.tokens", LLM + "embed_tokens"),
    (r"embed\.vit\.(patch|position)_embedding", TOWER + "embeddings.{0}_embedding"),
    (r"embed\.vit\.layers\.(\d+)\.norm([12])", TOWER + "encoder.layers.{0}.layer_norm{1}"),
    (r"embed\.vit\.layers\.(\d+)\.([qkv])", TOWER + "encoder.layers.{0}.self_attn.{1}_proj"),
    (r"embed\.vit\.layers\.(\d+)\.o", TOWER + "encoder.layers.{0}.self_attn.out_proj"),
    (r"embed\.vit\.layers\.(\d+)\.fc([12])", TOWER + "encoder.layers.{0}.mlp.fc{1}"),
    (r"embed\.vit\.post_norm", TOWER + "post_layernorm"),
    (r"embed\.(connector\.fc[12]|vae2llm|time_embedder\.mlp\.[02])", "{0}"),
    (r"layers\.(\d+)\.input_norm\.(und|gen)", LLM + "layers.{0}.input_layernorm{1}"),
    (r"layers\.(\d+)\.attention\.(und|gen)\.([qkvo])", LLM + "layers.{0}.self_attn.{2}_proj{1}"),
    (r"layers\.(\d+)\.attention\.(und|gen)\.([qk]_norm)", LLM + "layers.{0}.self_attn.{2}{1}"),
    (r"layers\.(\d+)\.mlp_norm\.(und|gen)", LLM + "layers.{0}.post_attention_layernorm{1}"),
    (r"layers\.(\d+)\.mlp\.(und|gen)\.(gate|up|down)", LLM + "layers.{0}.mlp{1}.{2}_proj"),
    (r"heads\.norm\.(und|gen)", LLM + "norm{0}"),
    (r"heads\.lm_head", "language_model.lm_head"),
    (r"heads\.llm2vae", "llm2vae"),
)
"""Modules of ours, and theirs."""

LATENT_TABLE, VIT_TABLE = "latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"
"""The frozen position tables: computed, hence no parameters of ours, but tensors of the published file."""


def official_name(name: str) -> str:
    """The published name of our whole-model tensor `name`."""
    module, _, leaf = name.rpartition(".")
    (theirs,) = (
        template.format(*(TWIN.get(group, group) for group in found.groups()))
        for pattern, template in MODULES
        if (found := re.fullmatch(pattern, module))
    )
    return f"{theirs}.{leaf}"


def table_sides(config: ModelConfig) -> dict[str, int]:
    """Cells per side of the frozen tables that the model has, by published name."""
    return dict(_table_sides(config))


def _table_sides(config: ModelConfig) -> Iterator[tuple[str, int]]:
    if config.visual_gen:
        yield LATENT_TABLE, config.latent_grid
    if config.visual_und:
        yield VIT_TABLE, config.vit.grid


def official_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the published file for this model, by its name there."""
    tables = {name: (side * side, config.hidden) for name, side in table_sides(config).items()}
    return {official_name(name): shape for name, shape in model_shapes(config).items()} | tables
