"""Capture of a forward pass: activations of every rank of a grid, assembled in sequence order on rank 0.

Shape letters: docs/notation.md.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from megabagel_kernels.attention.mask import dense_mask
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from megabagel.model.inputs import Hidden, Outputs, StageInputs
from megabagel.runtime.objects import gathered_bytes
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.images import vit_shares
from megabagel.train.build_rank import Rank

Parts = dict[str, list[tuple[np.ndarray, Tensor]]]
"""By quantity: (numbers of tokens, their values) as often as they were seen."""


class Watch:
    """Forward hooks that collect this rank's rows while its stages run one batch."""

    def __init__(self, machine: Rank, batch: PackedBatch, inputs: StageInputs) -> None:
        self.machine, self.batch, self.inputs = machine, batch, inputs
        self.place, shards = machine.batches.place, machine.config.parallel.row_shards
        self.token_U, token_G = batch.layout.split(self.place.cp)
        self.token_u, self.token_g = (self.place.share(rows, shards) for rows in (self.token_U, token_G))
        self.parts: Parts = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks into every stage of this rank."""
        handles = []

        def on(module: nn.Module, keep: Callable[[Any, Any], None]) -> None:
            handles.append(module.register_forward_hook(lambda _, inputs, result: keep(inputs, result)))

        for model in (stage.model for stage in self.machine.stages):
            for number, layer in model.layers.items():
                on(layer, partial(self._layer, f"layer{number}"))
            if model.first:
                on(model.embed, self._embedded)
                if self.machine.config.model.visual_und:
                    on(model.embed.vit, self._features)
            if model.last:
                on(model.heads.norm, partial(self._layer, "last_hidden_state"))
                on(model.heads, self._outputs)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _put(self, key: str, token_T: np.ndarray, values_T: Tensor) -> None:
        real = token_T >= 0
        values = values_T.detach().float().cpu()[torch.from_numpy(real)]
        self.parts.setdefault(key, []).append((token_T[real], values))

    def _rows(self, key: str, und_uD: Tensor, gen_gD: Tensor) -> None:
        self._put(key, self.token_u, und_uD)
        self._put(key, self.token_g, gen_gD)

    def _layer(self, key: str, _: Any, both: tuple[Tensor, Tensor]) -> None:
        self._rows(key, *both)

    def _embedded(self, _: Any, hidden: Hidden) -> None:
        self._rows("inputs_embeds", hidden.und_uD, hidden.gen_gD)
        latents = self.inputs.latents
        if latents is not None:
            self._put("t", self.token_g, latents.time_I[latents.image_g])

    def _features(self, _: Any, features_PE: Tensor) -> None:
        """The tower's output on the images that this context-parallel rank encodes, padding at the end."""
        patch_P = vit_shares(self.batch.pack, self.batch.layout.cp).tokens(self.place.cp)
        self._put("vit_out", np.pad(patch_P, (0, len(features_PE) - len(patch_P)), constant_values=-1), features_PE)

    def _outputs(self, received: tuple[Hidden, StageInputs], outputs: Outputs) -> None:
        hidden, _ = received
        self._put("ce", self.token_U[self.inputs.ce_row_Q.cpu().numpy()], outputs.ce_Q)
        self._put("mse", self.token_g, (outputs.velocity_gZ - hidden.target_gZ).square())
        self._put("v", self.token_g, outputs.velocity_gZ)
        self._put("weight", self.token_g, hidden.weight_g)
        if outputs.velocity_gZ.requires_grad:
            outputs.velocity_gZ.register_hook(partial(self._put, "grad/v", self.token_g))

    def whole(self) -> dict[str, Tensor]:
        """Every quantity in token order, on rank 0; nothing elsewhere. Called on all ranks."""
        mine: dict[str, Tensor] = {}
        for key, entries in self.parts.items():
            for number, (tokens, values) in enumerate(entries):
                name = f"{number} {key}"
                mine |= {f"tokens {name}": torch.from_numpy(tokens), f"values {name}": values}
        found: dict[str, list[tuple[np.ndarray, Tensor]]] = defaultdict(list)
        for data in gathered_bytes(to_bytes({name: tensor.contiguous() for name, tensor in mine.items()})):
            theirs = from_bytes(data)
            for name in (name for name in theirs if name.startswith("tokens ")):
                entry = name.removeprefix("tokens ")  # "3 layer1"
                found[entry.partition(" ")[2]].append((theirs[name].numpy(), theirs[f"values {entry}"]))
        return {key: _in_order(entries) for key, entries in found.items()}


def _in_order(entries: list[tuple[np.ndarray, Tensor]]) -> Tensor:
    """Values by rising token number; what several ranks hold is taken once."""
    tokens = np.concatenate([tokens for tokens, _ in entries])
    values = torch.cat([values for _, values in entries])
    _, first = np.unique(tokens, return_index=True)
    return values[torch.from_numpy(first)]


def visible(batch: PackedBatch) -> Tensor:
    """[S, S] uint8: who sees whom, put together from the mask integers of every context-parallel rank."""
    layout, tokens = batch.layout, batch.pack.tokens
    seen_SS = np.zeros((tokens, tokens), np.uint8)
    real_K = layout.token_K >= 0
    for rank in range(layout.cp):
        token_T = layout.rank(rank)
        seen_TK = dense_mask(layout.codes(batch.pack, rank))
        seen_SS[np.ix_(token_T[token_T >= 0], layout.token_K[real_K])] = seen_TK[np.ix_(token_T >= 0, real_K)]
    return torch.from_numpy(seen_SS)
