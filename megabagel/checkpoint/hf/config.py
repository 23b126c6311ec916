"""The official config as ours, and back (docs/bagel.md#sizes)."""

from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.config.typed_json import Positive, WrongValue, read_as
from megabagel.errors import UserError

T = TypeVar("T")

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


@dataclass(frozen=True)
class _Llm:
    """The entries of an `llm_config.json` that our model takes over."""

    num_hidden_layers: Positive
    hidden_size: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    intermediate_size: Positive
    vocab_size: Positive
    rms_norm_eps: float
    rope_theta: float
    head_dim: Positive | None = None


@dataclass(frozen=True)
class _Vit:
    """The same of a `vit_config.json`."""

    hidden_size: Positive
    num_attention_heads: Positive
    intermediate_size: Positive
    patch_size: Positive
    layer_norm_eps: float
    num_hidden_layers: Positive


def _read(kind: type[T], content: dict[str, Any]) -> T:
    """The entries of a file. Raises KeyError for the first that is missing, WrongValue for one of another kind."""
    for field in fields(kind):  # type: ignore[arg-type]
        if field.default is MISSING:
            content[field.name]
    return read_as(kind, content)  # type: ignore[no-any-return]


def llm_fields(llm: dict[str, Any]) -> dict[str, Any]:
    """Fields of ModelConfig from the content of an `llm_config.json`, as far as it holds them.

    `rope_theta` may stand in `rope_parameters`, where transformers 5 writes it. Raises KeyError or WrongValue.
    """
    rope = llm.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        if llm.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
            raise WrongValue("rope_theta is not the one of rope_parameters")
        llm = {**llm, "rope_theta": rope["rope_theta"]}
    read = _read(_Llm, llm)
    return {
        "layers": read.num_hidden_layers,
        "hidden": read.hidden_size,
        "heads": read.num_attention_heads,
        "kv_heads": read.num_key_value_heads,
        "head_dim": read.head_dim,
        "ffn": read.intermediate_size,
        "vocab": read.vocab_size,
        "norm_eps": read.rms_norm_eps,
        "rope_base": read.rope_theta,
    }


def vit_config(vit: dict[str, Any], layers: int, grid: int) -> VitConfig:
    """The tower from the content of a `vit_config.json`, with `layers` built and a table of `grid` x `grid` cells.

    Raises KeyError or WrongValue.
    """
    read = _read(_Vit, vit)
    return VitConfig(
        layers=layers,
        hidden=read.hidden_size,
        heads=read.num_attention_heads,
        ffn=read.intermediate_size,
        patch=read.patch_size,
        grid=grid,
        norm_eps=read.layer_norm_eps,
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
