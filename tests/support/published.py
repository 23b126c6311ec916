"""Toy folders in the published layout, written with the safetensors library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megabagel.checkpoint.hf.config import llm_json, vit_json
from megabagel.checkpoint.hf.names import official_shapes, table_sides
from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.model.positions import sincos_table

MODEL = ModelConfig(
    layers=2,
    hidden=24,
    heads=3,
    kv_heads=1,
    ffn=20,
    vocab=40,
    vit=VitConfig(layers=1, hidden=12, heads=2, ffn=18, patch=2, grid=5),
    latent_grid=3,
)
"""No two dimensions that could be confused are equal."""
VARIANTS = {"dense": replace(MODEL, variant="dense"), "moe": replace(MODEL, variant="moe"), "mot": MODEL}
Q = "language_model.model.layers.1.self_attn.q_proj.weight"
Weights = dict[str, torch.Tensor]


def weights(model: ModelConfig = MODEL, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Random weights by their published names, with the true tables in fp32."""
    generator = torch.Generator().manual_seed(1)
    sides = table_sides(model)
    return {
        name: sincos_table(model.hidden, sides[name])
        if name in sides
        else torch.randn(shape, generator=generator).to(dtype)
        for name, shape in official_shapes(model).items()
    }


def publish(folder: Path, tensors: Weights, model: ModelConfig = MODEL, **llm: Any) -> Path:
    """Write a folder with these weights; `llm` are more entries of its llm_config.json."""
    folder.mkdir()
    save_file(tensors, folder / "ema.safetensors", metadata={"format": "pt"})
    write_configs(folder, model, **llm)
    return folder


def write_configs(folder: Path, model: ModelConfig = MODEL, **llm: Any) -> None:
    (folder / "llm_config.json").write_text(json.dumps(llm_json(model) | llm))
    (folder / "vit_config.json").write_text(json.dumps(vit_json(model)))


def publish_shards(folder: Path, tensors: Weights, count: int = 3) -> Path:
    """The same in shards with an index."""
    folder.mkdir()
    placed: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::count]}
        save_file(part, folder / file)
        placed |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    write_configs(folder)
    return folder
