"""Export of a checkpoint in the published layout: one `ema.safetensors`, config files, autoencoder and tokenizer."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megabagel.checkpoint.hf.config import llm_fields, llm_json, vit_config, vit_json
from megabagel.checkpoint.hf.folder import (
    LLM_CONFIG,
    TOKENIZER_FILES,
    VAE_WEIGHTS,
    VIT_CONFIG,
    assets,
    copy_into,
    new_folder,
    read_json,
    write_json,
)
from megabagel.checkpoint.hf.importer import ASSETS, TABLE_TYPES, Summary, fresh, summary
from megabagel.checkpoint.hf.names import official_name, table_sides
from megabagel.checkpoint.hf.writer import write_safetensors
from megabagel.checkpoint.index import TYPES
from megabagel.checkpoint.lazy import LazyTensor
from megabagel.checkpoint.manifest import model_of
from megabagel.checkpoint.reader import Stored
from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.errors import UserError
from megabagel.model.freezing import is_frozen
from megabagel.model.positions import sincos_table
from megabagel.model.shapes_only import model_shapes

AS_STORED = "as-stored"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(
    checkpoint: Path, out: Path, weights: str | None = None, dtype: str = AS_STORED, beside: Path | None = None
) -> Summary:
    """Write a checkpoint of any grid as folder `out`, laid out as the published BAGEL-7B-MoT.

    Args:
        checkpoint: folder to export.
        out: new folder.
        weights: `ema` or `trained`; by default averaged weights if the checkpoint holds any.
        dtype: `bf16`, `fp32` or `as-stored`: the checkpoint's types, which are those of the imported file, or fp32
            after training.
        beside: folder whose config files, tokenizer and autoencoder are copied; by default those the import kept.

    Raises:
        UserError: the checkpoint lacks what was asked for, or the copied config files are of another model.
    """
    began = time.monotonic()
    stored = Stored(checkpoint)
    model = model_of(checkpoint, stored.manifest)
    tensors = _tensors(stored, model, weights, dtype)
    copied = _assets(checkpoint, model, beside)
    room = sum(tensor.nbytes for tensor in tensors.values()) + sum(file.stat().st_size for file in copied.values())
    with new_folder(out, room) as folder:
        copy_into(folder, copied)
        _write_configs(folder, model)
        write_safetensors(folder / "ema.safetensors", tensors)
        notes = tuple(_absent(folder, model))
    return summary(out, tensors, began, notes)


def _tensors(stored: Stored, model: ModelConfig, weights: str | None, dtype: str) -> dict[str, LazyTensor]:
    """Every tensor of the published file, by its name there."""
    checkpoint, manifest = stored.folder, stored.manifest
    averaged = manifest.ema > 0 if weights is None else weights == "ema"
    if averaged and not manifest.ema:
        raise UserError(
            f"--weights ema, but {checkpoint} holds no averaged weights (train.ema=0): use --weights trained, or name "
            "another checkpoint"
        )
    tensors = {}
    for name, shape in model_shapes(model).items():
        learns = not is_frozen(name, model, manifest.freeze)  # what does not learn has no average but itself
        key = f"{'ema' if averaged and learns else 'weight'}/{name}"
        if key not in stored or stored.shape(key) != shape:
            found = f"is {list(stored.shape(key))}" if key in stored else "is missing"
            raise UserError(f"{checkpoint}: tensor {key} {found}, expected {list(shape)}. Name another checkpoint.")
        tensors[official_name(name)] = stored.whole(key, DTYPES.get(dtype))
    types = stored.state().get(TABLE_TYPES, {})
    for name, side in table_sides(model).items():
        kind = DTYPES.get(dtype) or TYPES[types.get(name, "F32")]
        tensors[name] = fresh(partial(sincos_table, model.hidden, side), (side * side, model.hidden), kind)
    return tensors


def _assets(checkpoint: Path, model: ModelConfig, beside: Path | None) -> dict[str, Path]:
    """Files to copy: those that the user names or that the import kept, and the run's own autoencoder."""
    if beside is not None and not beside.is_dir():
        raise UserError(f"--assets {beside}: no such folder; expected one with config files and tokenizer")
    folder = beside or checkpoint / ASSETS
    files = assets(folder) if folder.is_dir() else {}
    if model.vae.codec == "flux" and model.vae.path and Path(model.vae.path).is_file():
        files.setdefault(VAE_WEIGHTS, Path(model.vae.path))
    return files


def _write_configs(folder: Path, model: ModelConfig) -> None:
    """Write the config files of the model that were not copied; those that were must be its own."""
    llm, vit = folder / LLM_CONFIG, folder / VIT_CONFIG
    if llm.is_file():
        _check_same(llm, lambda config: replace(model, **llm_fields(config)), model)
    else:
        write_json(llm, llm_json(model))
    if vit.is_file() and model.visual_und:
        _check_same(vit, lambda config: vit_config(config, model.vit.layers, model.vit.grid), model.vit)
    elif model.visual_und:
        write_json(vit, vit_json(model))


def _check_same(path: Path, read: Callable[[dict[str, Any]], Any], ours: ModelConfig | VitConfig) -> None:
    """Raise UserError unless a copied config file reads as the checkpoint's model."""
    try:
        theirs = read(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path.name} of the files to copy cannot be understood ({error!r}); expected the published model's config"
        ) from error
    for key in vars(ours).keys() - {"head_dim"}:  # may be left to its default
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"{path.name} of the files to copy has {key} = {getattr(theirs, key)!r}, the checkpoint's model has "
                f"{getattr(ours, key)!r}: name the folder that belongs to it with --assets"
            )


def _absent(folder: Path, model: ModelConfig) -> Iterator[str]:
    """Yield a note about files of a published folder that this one lacks."""
    absent = []
    if model.visual_gen and not (folder / VAE_WEIGHTS).is_file():
        absent.append(VAE_WEIGHTS)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        absent.append("tokenizer files")
    if absent:
        yield f"absent: {', '.join(absent)} (--assets names a folder to copy them from)"
