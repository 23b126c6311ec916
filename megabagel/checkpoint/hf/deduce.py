"""The config of our model from a published folder: numbers from its JSON files, the rest from its tensors."""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, Literal

from megabagel.checkpoint.hf.allowed import check_allowed
from megabagel.checkpoint.hf.config import VIT_LAYERS_LEFT_OUT, llm_fields, variant, vit_config
from megabagel.checkpoint.hf.folder import LLM_CONFIG, VIT_CONFIG, read_json
from megabagel.checkpoint.hf.names import LATENT_TABLE, LLM, TOWER, VIT_TABLE
from megabagel.config.checks import violations
from megabagel.config.load import to_dict
from megabagel.config.schema import Config, ModelConfig, VaeConfig, VitConfig
from megabagel.config.typed import Problems, build
from megabagel.errors import UserError

HEAD = f"{LLM.removesuffix('model.')}lm_head.weight"

Shapes = Mapping[str, tuple[int, ...]]


def deduce(folder: Path, shapes: Shapes, vae: VaeConfig) -> ModelConfig:
    """The model whose tensors have `shapes`, by the config files of `folder`.

    Whether every tensor fits is not judged here. Raises UserError, naming file and entry.
    """
    where = folder / LLM_CONFIG
    llm = read_json(where)
    check_allowed(llm, LLM_CONFIG, where)
    if llm.get("tie_word_embeddings") and HEAD in shapes:
        raise UserError(
            f"{where}: tie_word_embeddings = true, but there is a tensor {HEAD} beside the word embedding; expected "
            "false. Check that config and weights belong together."
        )
    first = f"{LLM}layers.0."
    model = ModelConfig(
        **with_entries(where, lambda: llm_fields(llm)),
        variant=_variant(llm, shapes, where),
        qk_norm=f"{first}self_attn.q_norm.weight" in shapes,
        qkv_bias=f"{first}self_attn.q_proj.bias" in shapes,
        visual_und=any(name.startswith((TOWER, "connector.")) for name in shapes) or VIT_TABLE in shapes,
        visual_gen=any(name.startswith(("vae2llm.", "llm2vae.", "time_embedder.")) for name in shapes)
        or LATENT_TABLE in shapes,
        vae=vae,
    )
    if model.visual_und:
        model = replace(model, vit=_vit(folder / VIT_CONFIG, shapes))
    if model.visual_gen:
        model = replace(
            model,
            latent_grid=_side(LATENT_TABLE, shapes, default=model.latent_grid),
            latent_patch=_latent_patch(shapes, vae.channels, default=model.latent_patch),
        )
    return checked(model, folder)


def checked(model: ModelConfig, where: Path) -> ModelConfig:
    """The model, if its numbers make sense together. Raises UserError with all that do not."""
    problems = Problems()
    build(ModelConfig, to_dict(model), problems, "model")
    lines = [text for _, text in problems.found]
    lines = lines or [line for line in violations(Config(model=model)) if line.startswith("model.")]
    if lines:
        raise UserError("\n  ".join((f"{where}: its config files describe no model that can be built", *lines)))
    return model


def with_entries(where: Path, read: Any) -> Any:
    """The result of `read`; an entry that it misses is a UserError."""
    try:
        return read()
    except KeyError as error:
        raise UserError(f"{where}: has no entry {error}; expected the config of the published model") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: cannot be understood ({error}); expected the published model's config") from error


def _variant(llm: dict[str, Any], shapes: Shapes, where: Path) -> Literal["dense", "moe", "mot"]:
    """Return the variant that the tensors have; `layer_module`, where given, must agree."""
    if any(".self_attn." in name and "_moe_gen." in name for name in shapes):
        found = "mot"
    else:
        found = "moe" if any("_moe_gen." in name for name in shapes) else "dense"
    if "layer_module" in llm and (said := variant(str(llm["layer_module"]), str(where))) != found:
        raise UserError(
            f"{where}: layer_module = {llm['layer_module']!r}, the layers of variant {said}, but the tensors are those "
            f"of variant {found}. Set it to fit the weights, or leave it out."
        )
    return found  # type: ignore[return-value]


def _vit(where: Path, shapes: Shapes) -> VitConfig:
    """The tower: as many layers as the tensors have, which `vit_config.json` counts with or without the last one."""
    config = read_json(where)
    check_allowed(config, VIT_CONFIG, where)
    prefix = f"{TOWER}encoder.layers."
    built = len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})
    grid = _side(VIT_TABLE, shapes, default=_side(f"{TOWER}embeddings.position_embedding.weight", shapes, default=70))
    tower = with_entries(where, lambda: vit_config(config, built, grid))
    counted = with_entries(where, lambda: config["num_hidden_layers"])
    if counted not in (built, built + VIT_LAYERS_LEFT_OUT):
        raise UserError(
            f"{where}: num_hidden_layers = {counted!r}, but there are tensors of {built} layers; expected {built}, or "
            f"{built + VIT_LAYERS_LEFT_OUT} with the last one left out. Check that config and weights belong together."
        )
    return tower


def _side(table: str, shapes: Shapes, default: int) -> int:
    """Cells per side of a square position table."""
    if table not in shapes:
        return default
    rows = shapes[table][0]
    if isqrt(rows) ** 2 != rows:
        raise UserError(
            f"tensor {table}: shape {list(shapes[table])}, expected a square number of rows, one per cell of a square "
            "grid. Check that the weights are the published model's."
        )
    return isqrt(rows)


def _latent_patch(shapes: Shapes, channels: int, default: int) -> int:
    """Latent cells per token side, from the numbers that a token has."""
    numbers = shapes.get("vae2llm.weight", (0, channels * default**2))[-1]
    side = isqrt(numbers // channels)
    if numbers != channels * side**2 or not side:
        raise UserError(
            f"tensor vae2llm.weight: shape {list(shapes['vae2llm.weight'])}, expected {channels} x a square number of "
            f"columns, as the autoencoder has {channels} channels. Check that weights and autoencoder belong together."
        )
    return side
