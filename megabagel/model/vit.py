"""The ViT (SigLIP layout, NaViT packing) and its connector (BAGEL section 2.2; docs/bagel.md#vit).

Shape letters: docs/notation.md. Tensor parallelism splits the ViT by heads and MLP width. Its rows are not split by
sequence parallelism, because they are few beside those of the language model.
"""

import torch
from torch import nn
from torch.nn import functional

from megabagel.config.schema import ModelConfig, VitConfig
from megabagel.model.factory import LayerFactory
from megabagel.model.inputs import Attend


def splits(config: VitConfig, shards: int) -> bool:
    """Whether the ViT can be split over `shards` tensor-parallel ranks; if not, each of them runs it whole."""
    return config.heads % shards == 0 and config.ffn % shards == 0


class VitLayer(nn.Module):
    """Pre-LayerNorm transformer layer with full attention inside each image."""

    def __init__(self, config: VitConfig, factory: LayerFactory) -> None:
        super().__init__()
        width = config.hidden
        self.head = width // config.heads
        self.norm1 = nn.LayerNorm(width, config.norm_eps)
        self.qkv = factory.column(width, {"q": width, "k": width, "v": width}, bias=True, rows_split=False)
        self.o = factory.row(width, width, bias=True, rows_split=False)
        self.norm2 = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = factory.column(width, {"fc1": config.ffn}, bias=True, rows_split=False)
        self.fc2 = factory.row(config.ffn, width, bias=True, rows_split=False)

    def forward(self, x_PE: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Run the layer on patches [P, E]; `attend` applies the mask between images. Returns [P, E]."""
        q, k, v = self.qkv(self.norm1(x_PE)).unflatten(-1, (3, -1, self.head)).unbind(1)
        x_PE = x_PE + self.o(attend(q, k, v).flatten(1))
        return x_PE + self.fc2(functional.gelu(self.fc1(self.norm2(x_PE)), approximate="tanh"))


class PositionEmbedding(nn.Embedding):
    """Learned positions, read by indexing: on GPUs its backward is deterministic, that of nn.Embedding is not."""

    def forward(self, grid_P: torch.Tensor) -> torch.Tensor:
        """Return the positions [P, E] of ids [P]."""
        return self.weight[grid_P]


class Vit(nn.Module):
    """ViT: linear patch embedding, learned positions, layers, final LayerNorm."""

    def __init__(self, config: VitConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(3 * config.patch**2, config.hidden)
        self.position_embedding = PositionEmbedding(config.grid**2, config.hidden)
        self.layers = nn.ModuleList(VitLayer(config, factory) for _ in range(config.layers))
        self.post_norm = nn.LayerNorm(config.hidden, config.norm_eps)

    def forward(self, patches: torch.Tensor, grid_P: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Encode the patches of several images, laid end to end.

        Args:
            patches: [P, 3 * patch**2] in [-1, 1].
            grid_P: int64 ids in the learned position table.
            attend: full attention inside each image.

        Returns:
            Features [P, E].
        """
        position_PE = self.position_embedding(grid_P)
        x_PE = self.patch_embedding(patches.to(position_PE.dtype)) + position_PE
        for layer in self.layers:
            x_PE = layer(x_PE, attend)
        return self.post_norm(x_PE)


class Connector(nn.Module):
    """Two-layer MLP (GELU, tanh form) from the ViT's width to the language model's."""

    def __init__(self, config: ModelConfig, factory: LayerFactory) -> None:
        super().__init__()
        self.fc1 = factory.column(config.vit.hidden, {"fc1": config.hidden}, bias=True, rows_split=False)
        self.fc2 = factory.row(config.hidden, config.hidden, bias=True, rows_split=False)

    def forward(self, x_PE: torch.Tensor) -> torch.Tensor:
        """Map features [P, E] to [P, D]."""
        return self.fc2(functional.gelu(self.fc1(x_PE), approximate="tanh"))
