"""Models to run from what training or publication left: a run folder, a checkpoint, or a published folder."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megabagel.checkpoint.hf.deduce import deduce
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.folder import LLM_CONFIG, VAE_WEIGHTS, assets
from megabagel.checkpoint.hf.importer import ASSETS, check_tables, check_tensors, find_weights
from megabagel.checkpoint.hf.names import official_shapes
from megabagel.checkpoint.hf.tokens import check_tokenizer
from megabagel.checkpoint.hf.vae import vae_config
from megabagel.checkpoint.manifest import CONFIG, MANIFEST, model_of
from megabagel.checkpoint.reader import Stored
from megabagel.checkpoint.saver import LATEST
from megabagel.config.load import load, override
from megabagel.config.schema import (
    Config,
    DataConfig,
    ParallelConfig,
    ResizeConfig,
    SourceConfig,
    TrainConfig,
    VaeConfig,
)
from megabagel.errors import UserError
from megabagel.inference.build import Fill, from_checkpoint, from_published, has_average

RELEASED = {"vae_resize": ResizeConfig(1024, 512), "vit_resize": ResizeConfig(980, 224)}
"""Resize rules of the released programs, for models that come without rules."""


@dataclass(frozen=True)
class Source:
    """A model on disk."""

    folder: Path
    config: Config
    """Model, tokenizer, resize rules; grid and precision are those of the caller."""
    fill: Fill
    weights: str
    """`ema`, `trained` or `published`."""
    digest: str
    """Of the weights: equal for equal ones."""


def open_source(path: Path, weights: str | None = None, overrides: tuple[str, ...] = ()) -> Source:
    """Find the model under `path`.

    Args:
        path: a run folder, a checkpoint folder, an imported checkpoint, or a folder as published.
        weights: `ema` or `trained`; by default the averaged ones where there are any.
        overrides: `section.key=value`, such as parallel.tp=2 or data.tokenizer=FILE.

    Raises:
        UserError: there is no model, it is damaged, or lacks the weights asked for.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; expected a run, a checkpoint or a published model")
    if (path / "checkpoints").is_dir():
        path = _latest(path)
    if (path / MANIFEST).is_file():
        return _checkpoint(path, weights, overrides)
    if (path / LLM_CONFIG).is_file():
        return _published(path, weights, overrides)
    raise UserError(
        f"{path}: no model there; expected a run folder (with checkpoints/), a checkpoint folder (with {MANIFEST}) or "
        f"a published folder (with {LLM_CONFIG})"
    )


def _latest(run: Path) -> Path:
    """The newest complete checkpoint of a run."""
    root = run / "checkpoints"
    named = root / (root / LATEST).read_text().strip() if (root / LATEST).is_file() else None
    complete = sorted(folder for folder in root.glob("step_*") if (folder / MANIFEST).is_file())
    if named in complete:
        return named  # type: ignore[return-value]
    if not complete:
        raise UserError(f"{root}: no complete checkpoint yet; train longer, or set checkpoint.every lower")
    return complete[-1]


def _checkpoint(folder: Path, weights: str | None, overrides: tuple[str, ...]) -> Source:
    stored = Stored(folder)
    averaged = has_average(stored.manifest) if weights is None else weights == "ema"
    if averaged and not has_average(stored.manifest):
        raise UserError(
            f"{folder}: holds no averaged weights (trained with train.ema=0, or imported): use trained ones"
        )
    if (folder / CONFIG).is_file():
        config = load(folder / CONFIG)
    else:
        config = _beside(folder / ASSETS, Config(model=model_of(folder, stored.manifest)))
    parts = sorted(box.file for entry in stored.index.values() for box in entry.boxes)
    sums = {name: stored.manifest.files[name].blocks for name in dict.fromkeys(parts)}
    digest = hashlib.sha256(json.dumps([averaged, sums], sort_keys=True).encode()).hexdigest()
    name = "ema" if averaged else "trained"
    return Source(folder, _inference(config, overrides, folder), from_checkpoint(stored, averaged), name, digest)


def _published(folder: Path, weights: str | None, overrides: tuple[str, ...]) -> Source:
    if weights is not None:
        raise UserError(f"{folder}: a published folder holds one set of weights; leave out --weights {weights}")
    files = find_weights(folder)
    vae = vae_config(folder / VAE_WEIGHTS) if (folder / VAE_WEIGHTS).is_file() else VaeConfig()
    model = deduce(folder, files.shapes, vae)
    check_tokenizer(folder, model.vocab)
    check_tensors(files, official_shapes(model), model)
    check_tables(files, model)
    config = _beside(folder, Config(model=model))
    return Source(folder, _inference(config, overrides, folder), from_published(files), "published", _digest(files))


def _beside(folder: Path, config: Config) -> Config:
    """A model that comes without a run: tokenizer and autoencoder lie in `folder`, sizes are those of the release."""
    files = assets(folder) if folder.is_dir() else {}
    model = config.model
    if VAE_WEIGHTS in files:
        model = replace(model, vae=replace(model.vae, path=str(files[VAE_WEIGHTS])))
    tokenizer = str(files["tokenizer.json"]) if "tokenizer.json" in files else "bytes"
    side = model.latent_grid * model.latent_stride
    vae_rule = replace(RELEASED["vae_resize"], max_size=min(1024, side), min_size=min(512, side))
    vit_side = model.vit.grid * model.vit.patch
    vit_rule = replace(RELEASED["vit_resize"], max_size=min(980, vit_side), min_size=min(224, vit_side))
    return replace(config, model=model, data=DataConfig(tokenizer=tokenizer, vae_resize=vae_rule, vit_resize=vit_rule))


def _inference(config: Config, overrides: tuple[str, ...], folder: Path) -> Config:
    """The settings that inference reads, on the grid and in the precision that the overrides name."""
    data = DataConfig(
        tokenizer=config.data.tokenizer, vae_resize=config.data.vae_resize, vit_resize=config.data.vit_resize
    )
    train = TrainConfig(precision=config.train.precision, packs_per_step=1)
    plain = Config(model=config.model, data=data, train=train, parallel=ParallelConfig())
    found = _overridden(plain, overrides, folder)
    return replace(found, parallel=replace(found.parallel, sp=False))


def _overridden(config: Config, overrides: tuple[str, ...], folder: Path) -> Config:
    """Apply overrides with the rules of a training config, which wants data: one source of text stands in for it."""
    data = replace(config.data, sources=(SourceConfig("none", str(folder), "text"),))
    found = override(replace(config, data=data), list(overrides), str(folder))
    return replace(found, data=replace(found.data, sources=()))


def _digest(files: TensorFiles) -> str:
    """Of published weights: every tensor's name, type, shape and first row; reading all of 29 GB would take minutes."""
    digest = hashlib.sha256()
    for name in files.names:
        digest.update(f"{name} {files.type(name)} {files.shape(name)}".encode())
        digest.update(files.rows(name, 0, 1).view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
