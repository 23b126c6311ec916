"""Parameter counts of a rank, taken from the real model built on tensors without storage.

No formula for the counts is repeated here: one layer and both ends of the model are built as one of `tp` ranks has them
(`model.shapes_only`), and stages are sums of these.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from megabagel.config.schema import ModelConfig
from megabagel.model.freezing import is_frozen
from megabagel.model.shapes_only import build_shapes
from megabagel.model.vae_flux import Autoencoder


@dataclass(frozen=True)
class Numbers:
    """Numbers on one rank: weights that learn, weights that are frozen, and fp32 tables."""

    learning: int = 0
    frozen: int = 0
    tables: int = 0

    def __add__(self, other: "Numbers") -> "Numbers":
        return Numbers(self.learning + other.learning, self.frozen + other.frozen, self.tables + other.tables)

    def __mul__(self, times: int) -> "Numbers":
        return Numbers(self.learning * times, self.frozen * times, self.tables * times)

    @property
    def weights(self) -> int:
        """All that are stored in the type of the model."""
        return self.learning + self.frozen


@dataclass(frozen=True)
class Parts:
    """A model in the pieces that pipeline stages are made of, as one of `tp` ranks holds them."""

    embed: Numbers
    layer: Numbers
    heads: Numbers

    def stage(self, layers: int, first: bool, last: bool) -> Numbers:
        """A run of layers with the ends of the model that it has."""
        return self.layer * layers + self.embed * int(first) + self.heads * int(last)


@lru_cache(maxsize=256)
def count_parts(model: ModelConfig, tp: int, freeze: tuple[str, ...] = ()) -> Parts:
    """The pieces of a model on each of `tp` tensor-parallel ranks (all hold equal numbers)."""
    built = build_shapes(model, range(1), tp=tp)
    parts = {"embed": Numbers(), "layers": Numbers(), "heads": Numbers()}
    for name, weight in built.named_parameters():
        part = name.partition(".")[0]
        frozen = is_frozen(name, model, freeze)
        parts[part] += Numbers(frozen=weight.numel()) if frozen else Numbers(learning=weight.numel())
    for name, table in built.named_buffers():
        parts[name.partition(".")[0]] += Numbers(tables=table.numel())
    return Parts(parts["embed"], parts["layers"], parts["heads"])


@lru_cache(maxsize=16)
def codec_numbers(model: ModelConfig) -> int:
    """fp32 numbers of the frozen image codec, which every rank loads."""
    if not model.visual_gen or model.vae.codec == "blocks":
        return 0
    with torch.device("meta"):
        return sum(weight.numel() for weight in Autoencoder(model.vae).parameters())
