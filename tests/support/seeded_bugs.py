"""Errors to plant in the program: each replaces one function by one that is wrong in one way.

Workers import them by name, so they stand at the top of a module.
"""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.sequence import sample
from megabagel.sequence.items import Item, Latent, Mode, Text
from megabagel.sequence.sample import lay_out

Patch = pytest.MonkeyPatch


def experts_swapped(patch: Patch) -> None:
    """In the importer's names."""
    patch.setattr("megabagel.checkpoint.hf.names.TWIN", {"und": "_moe_gen", "gen": ""})


def vit_patches_transposed(patch: Patch) -> None:
    """Patches of an image column by column, as another cut of the pixels would give them."""
    from megabagel.parity import packs

    right = packs.packed_batch

    def packed_batch(*args: Any) -> Any:
        batch = right(*args)
        images = [image for plan in batch.pack.samples for image in plan.vits]  # all of them on this rank
        sizes = [image.rows * image.cols for image in images]
        *patches, padding = batch.patches.split([*sizes, len(batch.patches) - sum(sizes)])
        turned = [
            patches.unflatten(0, (image.rows, image.cols)).transpose(0, 1).flatten(0, 1)
            for image, patches in zip(images, patches, strict=True)
        ]
        return dataclasses.replace(batch, patches=torch.cat([*turned, padding]))

    patch.setattr("megabagel.parity.train_case.packed_batch", packed_batch)


def columns_first(cells_Chw: Tensor, size: int) -> Tensor:
    """`patchify` with its patches column by column."""
    channels, height, width = cells_Chw.shape
    grid = cells_Chw.reshape(channels, height // size, size, width // size, size)
    return grid.permute(3, 1, 2, 4, 0).reshape(-1, size * size * channels)


def patchify_transposed(patch: Patch) -> None:
    patch.setattr("megabagel.parity.prim_case.patchify", columns_first)


def table_transposed(patch: Patch) -> None:
    """The model's 2-D table encodes the row in its first half."""
    from megabagel.model.positions import sincos_table

    def transposed(dim: int, grid: int) -> Tensor:
        return sincos_table(dim, grid).unflatten(0, (grid, grid)).transpose(0, 1).flatten(0, 1)

    for module in ("model.bagel", "parity.prim_case"):
        patch.setattr(f"megabagel.{module}.sincos_table", transposed)


def rope_interleaved(patch: Patch) -> None:
    """Channel 2 i is rotated against 2 i + 1."""

    def apply_rope(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
        cos, sin = (table[:, None, : x_TNH.shape[-1] // 2] for table in (cos_TH, sin_TH))
        even, odd = x_TNH[..., 0::2], x_TNH[..., 1::2]
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)

    for module in ("megabagel_kernels.qk_norm_rope.torch", "megabagel.parity.prim_case"):
        patch.setattr(f"{module}.apply_rope", apply_rope)


def shift_ignored(patch: Patch) -> None:
    from megabagel.model.flow import timestep

    patch.setattr("megabagel.parallel.inputs.timestep", lambda draw, shift, *rest: timestep(draw, 1.0, *rest))


def target_reversed(patch: Patch) -> None:
    """x_0 - eps instead of eps - x_0."""
    from megabagel.parallel.inputs import InputBuilder

    right = InputBuilder._latents

    def latents(*args: Any) -> Any:
        found = right(*args)
        return dataclasses.replace(found, target_gZ=-found.target_gZ)

    patch.setattr(InputBuilder, "_latents", latents)


def noised_image_seen(patch: Patch) -> None:
    """Later tokens see the noised image."""
    patch.setattr(sample, "_mode", lambda item: Mode.CAUSAL if isinstance(item, Text) else Mode.FULL)


def clean_copy_moved_on(patch: Patch) -> None:
    """The RoPE counter moves after a noised image."""
    right = sample._tokens

    def tokens(item: Item, counter: int) -> Any:
        for *rest, after in right(item, counter):
            yield *rest, after + (isinstance(item, Latent) and item.noised)

    patch.setattr(sample, "_tokens", tokens)


def dropped_images_leave_no_gap(patch: Patch) -> None:
    patch.setattr(
        "megabagel.parity.packs.lay_out",
        lambda items, key, dropped: lay_out(items, key, dropped, advance_dropped=False),
    )


def k_norm_missing(patch: Patch) -> None:
    from megabagel.model.layers import Attention

    patch.setattr(Attention, "k_gamma", None)


def ce_over_own_rows(patch: Patch) -> None:
    """Each rank takes the mean over its own rows, and the ranks average."""
    from megabagel.train import step

    right = step.weigh

    def weigh(outputs: Any, inputs: Any, counts: Any, config: Any) -> Any:
        own = len(outputs.ce_Q) * dist.get_world_size()
        return right(outputs, inputs, step.Counts(own, counts.mse), config)

    patch.setattr(step, "weigh", weigh)


def tp_sums_missing(patch: Patch) -> None:
    """Gradients that are partial over tensor-parallel ranks stay so."""

    def finish_gradients(chunks: Any, tp: Any) -> None:
        for chunk in chunks:
            chunk.finish_grad_sync()

    patch.setattr("megabagel.train.optimizer.finish_gradients", finish_gradients)


def averages_before_the_step(patch: Patch) -> None:
    from megabagel.train.optimizer import Optimizer

    right = Optimizer.step

    def step(self: Any, learning_rate: float) -> float:
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.ema), 1 - self.config.ema)
        averages, self.ema = self.ema, {}
        norm = right(self, learning_rate)
        self.ema = averages
        return norm

    patch.setattr(Optimizer, "step", step)


def adam_eps_as_usual(patch: Patch) -> None:
    from megabagel.train import optimizer

    right = optimizer._optimizer_config
    patch.setattr(optimizer, "_optimizer_config", lambda *args: dataclasses.replace(right(*args), adam_eps=1e-8))


def rate_a_step_late(patch: Patch) -> None:
    from megabagel.train.schedule import learning_rate

    patch.setattr(
        "megabagel.parity.trace_case.learning_rate", lambda config, step: learning_rate(config, max(0, step - 1))
    )
