"""A model to start pretraining from: Qwen2.5, SigLIP and FLUX's autoencoder (docs/bagel.md#initial-weights)."""

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional

from megabagel.checkpoint.hf.allowed import check_allowed
from megabagel.checkpoint.hf.config import VIT_LAYERS_LEFT_OUT, llm_fields, vit_config
from megabagel.checkpoint.hf.deduce import checked, with_entries
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.folder import (
    LLM_CONFIG,
    TOKENIZER_FILES,
    VAE_WEIGHTS,
    VIT_CONFIG,
    assets,
    copy_into,
    read_json,
)
from megabagel.checkpoint.hf.importer import (
    ASSETS,
    Summary,
    check_tensors,
    find_weights,
    fresh,
    summary,
    write_checkpoint,
    write_model,
)
from megabagel.checkpoint.hf.names import TWIN, official_name, table_sides
from megabagel.checkpoint.hf.tokens import check_tokenizer
from megabagel.checkpoint.hf.vae import vae_config
from megabagel.checkpoint.lazy import LazyTensor
from megabagel.config.schema import ModelConfig
from megabagel.model.init_weights import initial_values
from megabagel.model.shapes_only import model_shapes

SIGLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
"""Defaults of a SigLIP config file, for the keys it leaves out."""
ROTARY = {"rotary frequencies": r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"}
"""Tensors of a Qwen2.5 folder that BAGEL does not have: pattern of names by what they are."""
QK_NORM = re.compile(r"\.self_attn\.[qk]_norm")
WORDS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PATCHES, POSITIONS = (f"vision_model.embeddings.{name}_embedding.weight" for name in ("patch", "position"))


LANGUAGE_MODEL, VIT_MODEL = "language_model.", "vit_model."
"""Prefixes that BAGEL's names put before those of the parts."""


@dataclass(frozen=True)
class Origin:
    """Where a tensor of the whole model comes from."""

    how: str
    tensor: LazyTensor


def beyond_the_tower(layers: int) -> dict[str, str]:
    """The same for a SigLIP folder of which the first `layers` layers are used."""
    return {
        "text model": r"text_model\..*",
        "pooling head": r"vision_model\.head\..*",
        "contrastive scale and bias": r"logit_(scale|bias)",
        "position ids": r"vision_model\.embeddings\.position_ids",
        "last layer": rf"vision_model\.encoder\.layers\.{layers}\..*",
    }


def import_parts(
    llm: Path,
    vit: Path,
    vae: Path,
    out: Path,
    variant: Literal["dense", "moe", "mot"] = "mot",
    latent_grid: int = 64,
    vit_grid: int = 70,
    seed: int = 0,
) -> Summary:
    """Import a Qwen2.5 folder, a SigLIP folder and an `ae.safetensors` as checkpoint `out`.

    See docs/bagel.md#initial-weights. Generation experts start as copies of the understanding experts, q/k norms as
    ones, llm2vae as zeros; connector, vae2llm and time embedder are drawn at random.

    Args:
        llm: Qwen2.5 folder.
        vit: SigLIP folder.
        vae: weights file of FLUX's autoencoder.
        out: new folder.
        variant: which weights the experts have of their own.
        latent_grid: side of the latent position table, cells.
        vit_grid: side that the ViT's position table is resized to, cells.
        seed: of the random weights.

    Raises:
        UserError: a part is damaged, or BAGEL is not made of such a part.
    """
    began = time.monotonic()
    words, tower = find_weights(llm), find_weights(vit)
    model = _model(llm, vit, vae, words, variant, latent_grid, vit_grid)
    leave_out = beyond_the_tower(model.vit.layers)
    notes = [*_left_out(words, ROTARY), *_left_out(tower, leave_out)]
    words, tower = _without(words, ROTARY), _without(tower, leave_out)
    check_tokenizer(llm, model.vocab)
    tied = HEAD not in words and bool(read_json(llm / "config.json").get("tie_word_embeddings", False))
    check_tensors(words, _expected_words(model, words, tied))
    check_tensors(tower, _expected_tower(model, tower))
    origins = {name: _origin(name, shape, words, tower, model, seed) for name, shape in model_shapes(model).items()}
    notes += [f"tensors {how}: {count:,}" for how, count in Counter(origin.how for origin in origins.values()).items()]
    tensors = {name: origin.tensor for name, origin in origins.items()}

    def add(folder: Path) -> None:
        copy_into(folder / ASSETS, {name: file for name, file in assets(llm).items() if name in TOKENIZER_FILES})
        copy_into(folder / ASSETS, {VAE_WEIGHTS: vae})
        write_model(folder, out, model)

    write_checkpoint(out, model, tensors, dict.fromkeys(table_sides(model), "F32"), add)
    return summary(out, tensors, began, tuple(notes))


def _model(
    llm: Path,
    vit: Path,
    vae: Path,
    words: TensorFiles,
    variant: Literal["dense", "moe", "mot"],
    latent_grid: int,
    vit_grid: int,
) -> ModelConfig:
    """The model that the parts make. Raises UserError for parts that BAGEL is not made of."""
    llm_file, vit_file = llm / "config.json", vit / "config.json"
    llm_json, vit_json = read_json(llm_file), read_json(vit_file)
    vit_json = SIGLIP_DEFAULTS | with_entries(vit_file, lambda: dict(vit_json.get("vision_config", vit_json)))
    check_allowed(llm_json, LLM_CONFIG, llm_file)
    check_allowed(vit_json, VIT_CONFIG, vit_file)
    built = with_entries(vit_file, lambda: vit_json["num_hidden_layers"] - VIT_LAYERS_LEFT_OUT)
    model = ModelConfig(
        **with_entries(llm_file, lambda: llm_fields(llm_json)),
        variant=variant,
        qk_norm=True,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in words,
        vit=with_entries(vit_file, lambda: vit_config(vit_json, built, vit_grid)),
        vae=vae_config(vae),
        latent_grid=latent_grid,
    )
    return checked(model, llm_file)


def _left_out(files: TensorFiles, patterns: Mapping[str, str]) -> Iterator[str]:
    """Yield a note for each kind of tensor that `_without` leaves out."""
    for what, pattern in patterns.items():
        count = sum(re.fullmatch(pattern, name) is not None for name in files.names)
        if count:
            yield f"left out of {files.path}: {what} ({count:,})"


def _without(files: TensorFiles, patterns: Mapping[str, str]) -> TensorFiles:
    return TensorFiles(files.path, lambda name: not any(re.fullmatch(pattern, name) for pattern in patterns.values()))


def _expected_words(model: ModelConfig, words: TensorFiles, tied: bool) -> dict[str, tuple[int, ...]]:
    """Tensors that the language model's files must hold: q/k norms in every layer or in none, the head unless tied."""
    has_norms = any(QK_NORM.search(name) for name in words.names)
    expected = {}
    for name, shape in model_shapes(model).items():
        source = official_name(name)
        if (
            source.startswith(LANGUAGE_MODEL)
            and TWIN["gen"] not in source
            and (has_norms or not QK_NORM.search(source))
        ):
            expected[source.removeprefix(LANGUAGE_MODEL)] = shape
    if tied:
        del expected[HEAD]
    return expected


def _expected_tower(model: ModelConfig, tower: TensorFiles) -> dict[str, tuple[int, ...]]:
    """Tensors that the tower's files must hold; the position table may have any square grid."""
    names = {name: official_name(name) for name in model_shapes(model)}
    expected = {
        names[name].removeprefix(VIT_MODEL): shape
        for name, shape in model_shapes(model).items()
        if names[name].startswith(VIT_MODEL)
    }
    expected[PATCHES] = (model.vit.hidden, 3, model.vit.patch, model.vit.patch)
    rows = tower.shape(POSITIONS)[0] if POSITIONS in tower else 0
    if rows and isqrt(rows) ** 2 == rows:
        expected[POSITIONS] = (rows, model.vit.hidden)
    return expected


def _origin(
    name: str, shape: tuple[int, ...], words: TensorFiles, tower: TensorFiles, model: ModelConfig, seed: int
) -> Origin:
    """Where a whole-model tensor comes from."""
    source = official_name(name)
    if source.startswith(VIT_MODEL):
        return _tower_origin(source.removeprefix(VIT_MODEL), shape, tower)
    source = source.removeprefix(LANGUAGE_MODEL)
    twin = source.replace(TWIN["gen"], "")
    if twin in words:
        return Origin("taken over" if twin == source else "copied from the understanding expert", words.lazy(twin))
    if source == HEAD:
        return Origin("copied from the word embedding, to which it was tied", words.lazy(WORDS))
    made = fresh(partial(initial_values, name, shape, model, seed), shape)
    return Origin("of ones, as q/k norms" if QK_NORM.search(source) else f"new, from seed {seed}", made)


def _tower_origin(source: str, shape: tuple[int, ...], tower: TensorFiles) -> Origin:
    """The convolution over patches becomes a linear, the position table gets the grid's size, the rest stays."""
    found, dtype = tower.shape(source), tower.dtype(source)
    if source == PATCHES:
        make = partial(_linear_patches, tower, shape)
        return Origin("made a linear from the convolution over patches", fresh(make, shape, dtype))
    if found != shape:
        old, new = isqrt(found[0]), isqrt(shape[0])
        make = partial(_resized, tower, old, new)
        return Origin(
            f"resized (bicubic), as positions, from {old} x {old} to {new} x {new}", fresh(make, shape, dtype)
        )
    return Origin("taken over", tower.lazy(source))


def _linear_patches(tower: TensorFiles, shape: tuple[int, ...]) -> torch.Tensor:
    """[E, channel, row, column] -> [E, row * column * channel], channel fastest."""
    return tower.rows(PATCHES, 0, shape[0]).permute(0, 2, 3, 1).reshape(shape)


def _resized(tower: TensorFiles, old: int, new: int) -> torch.Tensor:
    """[old * old, E] -> [new * new, E]."""
    table = tower.rows(POSITIONS, 0, old * old).float().unflatten(0, (old, old)).permute(2, 0, 1)[None]
    resized = functional.interpolate(table, (new, new), mode="bicubic", align_corners=False, antialias=new < old)
    return resized[0].permute(1, 2, 0).flatten(0, 1)
