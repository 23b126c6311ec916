"""The official config as ours, and back (docs/bagel.md#sizes)."""

from typing import Any

from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.errors import UserError

LAYERS = {"Qwen2DecoderLayer": "dense", "Qwen2MoEDecoderLayer": "moe", "Qwen2MoTDecoderLayer": "mot"}
"""Variants by the released code's name of a layer."""

VIT_LAYERS_LEFT_OUT = 1
"""`vit_config.json` counts a last layer that the model, which reads the one before it, does not build."""


def variant(layer_module: str, where: str) -> Any:
    """Our name of a layer kind.

    Raises UserError for another kind, naming `where` it was found.
    """
    if layer_module not in LAYERS:
        raise UserError(
            f"{where}: layer_module = {layer_module!r}: expected one of {', '.join(LAYERS)}; BAGEL has no others"
        )
    return LAYERS[layer_module]


def llm_fields(llm: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig from the content of an `llm_config.json`, as far as it holds them.

    Raises KeyError for a missing entry.
    """
    return {
        "layers": llm["num_hidden_layers"],
        "hidden": llm["hidden_size"],
        "heads": llm["num_attention_heads"],
        "kv_heads": llm["num_key_value_heads"],
        "head_dim": llm.get("head_dim"),
        "ffn": llm["intermediate_size"],
        "vocab": llm["vocab_size"],
        "norm_eps": llm["rms_norm_eps"],
        "rope_base": float(llm["rope_theta"]),
    }


def vit_config(vit: dict[str, Any], layers: int, grid: int) -> VitConfig:
    """The tower from the content of a `vit_config.json`, with `layers` built and a table of `grid` x `grid` cells.

    Raises KeyError for a missing entry.
    """
    return VitConfig(
        layers=layers,
        hidden=vit["hidden_size"],
        heads=vit["num_attention_heads"],
        ffn=vit["intermediate_size"],
        patch=vit["patch_size"],
        grid=grid,
        norm_eps=vit["layer_norm_eps"],
    )


def llm_json(model: ModelConfig) -> dict[str, Any]:
    """Content of `llm_config.json` for a model."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        **({"head_dim": model.head_dim} if model.head_dim else {}),
        "vocab_size": model.vocab,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_base,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
    }


def vit_json(model: ModelConfig) -> dict[str, Any]:
    """Content of `vit_config.json` for a model."""
    vit = model.vit
    return {
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vit.hidden,
        "intermediate_size": vit.ffn,
        "num_hidden_layers": vit.layers + VIT_LAYERS_LEFT_OUT,
        "num_attention_heads": vit.heads,
        "num_channels": 3,
        "image_size": vit.grid * vit.patch,
        "patch_size": vit.patch,
        "layer_norm_eps": vit.norm_eps,
        "attention_dropout": 0.0,
    }
