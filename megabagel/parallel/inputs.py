"""Conversion of a packed batch to the inputs of one pipeline stage: copy to the device, encode images, add noise.

All index arrays were computed by `sequence.rank_rows` in the loader worker; none is derived from the pack here.

Shape letters: see `model.inputs` and `sequence.rank_rows`; L latent tokens of the pack, in token order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megabagel_kernels.flow import LatentImages, NoisedRows, noised
from torch.nn import functional

from megabagel.config.schema import Config
from megabagel.model.flow import timestep
from megabagel.model.inputs import Constraint, LatentInputs, Rope, StageInputs, VitInputs
from megabagel.model.kernels import TORCH, Kernels
from megabagel.model.positions import rope_tables
from megabagel.model.vae import Codec
from megabagel.parallel.attention import HOST, AttentionEngine, attend_across, every_layer, join_over_cp
from megabagel.parallel.mesh import Axis, Mesh
from megabagel.runtime.device import to_device
from megabagel.runtime.phase import phase
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.rank_rows import LatentRows, RankRows, VitRows

Rows = RankRows[torch.Tensor]


@dataclass(frozen=True)
class GivenLatents:
    """Noised latents given by the caller instead of encoded images: a trajectory to replay (docs/srum.md)."""

    x_t_LZ: torch.Tensor
    """x_t of every latent token of the pack."""
    time: float
    """Timestep in [0, 1] of all of them."""


@dataclass(frozen=True)
class FixedNoise:
    """Latents and noise given by the caller instead of encoded images and keyed noise: the golden cases of parity."""

    x0_LZ: torch.Tensor
    eps_LZ: torch.Tensor
    constraint_LZ: torch.Tensor | None = None
    """x_0' of the second target, where the batch has one."""


Outside = GivenLatents | FixedNoise | None
"""Latents given by the caller, or None: those of the batch's images."""


class InputBuilder:
    """Builds the `StageInputs` of this rank.

    Args:
        config: the run.
        mesh: this rank's place in the grid.
        codec: image codec; None if the caller gives all latents.
        device: where the model runs.
        kernels: implementation of the noising.
        attention: attention engine.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        codec: Codec | None,
        device: torch.device,
        kernels: Kernels = TORCH,
        attention: AttentionEngine = HOST,
    ) -> None:
        self.config, self.mesh, self.codec, self.device = config, mesh, codec, device
        self.kernels, self.attention = kernels, attention

    def build(self, batch: PackedBatch, outside: Outside = None) -> StageInputs:
        """Build the tensors of one micro-batch. Collective over the ranks of the first stage that share the pack.

        Args:
            batch: made for this rank.
            outside: latents for every image of the batch, clean ones too, instead of encoded pixels.
        """
        rows, model = batch.rows.to(self.device), self.config.model
        rope = rope_tables(rows.position_T, model.kv_channels, model.rope_base, model.rope_precision)
        return StageInputs(
            attend=every_layer(attend_across(batch.plans.layers, self.attention, self.mesh.cp)),
            rope=Rope(*rope),
            word_U=rows.token_id_U,
            is_word_U=rows.is_text_U,
            vit=None if rows.vit is None else self._vit(batch, rows.vit),
            latents=None if rows.latents is None else self._latents(batch, rows, rows.latents, outside),
            ce_row_Q=rows.ce_row_Q,
            label_Q=rows.label_Q,
            source_Q=rows.source_Q,
            source_g=rows.source_g,
        )

    def _vit(self, batch: PackedBatch, rows: VitRows[torch.Tensor]) -> VitInputs:
        """Build the ViT inputs of this context-parallel rank's share of the images."""
        assert batch.patches is not None
        return VitInputs(
            patches=to_device(batch.patches, self.device),
            grid=rows.grid,
            grid_all=rows.grid_all,
            row_U=rows.row_U,
            attend=attend_across(batch.plans.vit, self.attention),
            collect=lambda encoded: join_over_cp(encoded, self.mesh.cp)[rows.gathered_row],
        )

    def _latents(
        self, batch: PackedBatch, rows: Rows, latents: LatentRows[torch.Tensor], outside: Outside
    ) -> LatentInputs:
        if not len(latents.seed_I):
            return self._no_latents(len(latents.image_g))
        # Padding rows have index -1. They read entry 0 instead, and `real_g` sets their values and weights to zero.
        image_g = latents.image_g.clamp_min(0)
        time_I = self._times(latents, outside)
        noised_g, second_g = self._noised(batch, rows, latents, outside, time_I)
        # `real_G` also excludes images that could not be decoded (NaN pixels): their rows stay, without loss.
        real_g, constraint = noised_g.real_G, None
        if second_g is not None and latents.constraint is not None:
            # A pair of which either picture is lost has no loss at all: half of it would be another objective.
            real_g = real_g & (second_g.real_G | (latents.constraint.weight_g == 0))
            constraint = Constraint(second_g.target_GZ, latents.constraint.weight_g * real_g)
        return LatentInputs(
            x_t_gZ=noised_g.x_t_GZ,
            target_gZ=noised_g.target_GZ,
            weight_g=latents.weight_g * real_g,
            grid_g=latents.grid_g * real_g,
            time_I=time_I,
            image_g=image_g * real_g,
            constraint=constraint,
        )

    def _noised(
        self,
        batch: PackedBatch,
        rows: Rows,
        latents: LatentRows[torch.Tensor],
        outside: Outside,
        time_I: torch.Tensor,
    ) -> tuple[NoisedRows, NoisedRows | None]:
        """Return the noised rows, and those of the second flow target's images where the batch has any."""
        second = latents.constraint
        if outside is None:
            images = self._noised_images(batch, latents, time_I)
            noised_g = self.kernels.noised_rows(images, latents.image_g, latents.place_g)
            if second is None:
                return noised_g, None
            # The same seeds, hence the same noise, around the latents of the other image.
            others = replace(images, start_I=second.start_I)
            return noised_g, self.kernels.noised_rows(others, latents.image_g, latents.place_g)
        real_g, image_g, latent_g = latents.image_g >= 0, latents.image_g.clamp_min(0), rows.latent_g.clamp_min(0)
        if isinstance(outside, GivenLatents):
            x_t_gZ = outside.x_t_LZ.to(self.device)[latent_g] * real_g[:, None]
            return NoisedRows(x_t_gZ, torch.zeros_like(x_t_gZ), real_g), None
        x0_gZ, eps_gZ = (x.to(self.device)[latent_g] for x in (outside.x0_LZ, outside.eps_LZ))
        noised_g = noised(x0_gZ, eps_gZ, time_I[image_g], real_g)
        if outside.constraint_LZ is None or second is None:
            return noised_g, None
        return noised_g, noised(outside.constraint_LZ.to(self.device)[latent_g], eps_gZ, time_I[image_g], real_g)

    def _times(self, latents: LatentRows[torch.Tensor], outside: Outside) -> torch.Tensor:
        """Return the timesteps [I]."""
        if isinstance(outside, GivenLatents):
            return torch.full_like(latents.raw_time_I, outside.time)
        train = self.config.train
        return timestep(latents.raw_time_I, train.timestep_shift, train.timestep_precision)

    def _noised_images(
        self, batch: PackedBatch, latents: LatentRows[torch.Tensor], time_I: torch.Tensor
    ) -> LatentImages:
        """Encode the images and describe every use of their latents: place, timestep and noise seed."""
        model = self.config.model
        with phase("vae", counted=False):
            latents_of_images = self._encode(batch, latents).flatten()
        return LatentImages(
            latents=latents_of_images,
            start_I=latents.start_I,
            height_I=latents.height_I,
            width_I=latents.width_I,
            time_I=time_I,
            seed_I=latents.seed_I,
            channels=model.latent_dim // model.latent_patch**2,
            patch=model.latent_patch,
        )

    def _no_latents(self, rows: int) -> LatentInputs:
        """Return the inputs of a pack without latents: padding rows, on which the generation expert still runs."""
        none = torch.zeros(rows, self.config.model.latent_dim, device=self.device)
        zero = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return LatentInputs(none, none, none[:, 0], zero, torch.zeros(1, device=self.device), zero)

    def _encode(self, batch: PackedBatch, latents: LatentRows[torch.Tensor]) -> torch.Tensor:
        """Encode every distinct image of the pack: each rank of the stage its share, then an all-gather.

        Returns:
            [latent tokens of all images, Z]: the images end to end in order of first use, each stored as
            [channels, height, width]. The second dimension only makes rows of Z numbers for the gather; patches are cut
            later, by the noising kernel.
        """
        codec, width = self.codec, self.config.model.latent_dim
        assert codec is not None
        cells = [torch.zeros(0, width, device=self.device)]
        for seed, moments_1Chw in zip(latents.posterior_seeds, self._moments(batch, codec), strict=True):
            cells.append(codec.draw(moments_1Chw, [seed])[0].reshape(-1, width))
        own = torch.cat(cells)
        # Every rank contributes the same number of rows, as `all_gather_into_tensor` requires.
        own = functional.pad(own, (0, 0, 0, latents.encoded_rows - len(own)))
        return _gathered(own, self.mesh.tp_cp)[latents.gathered_row]

    def _moments(self, batch: PackedBatch, codec: Codec) -> Iterator[torch.Tensor]:
        """Return the codec's moments of every image that this rank encodes, from the latent cache or from pixels."""
        if batch.moments is not None:
            return (to_device(cached[None], self.device) for cached in batch.moments)
        # One image at a time: sizes differ, and only one image's activations are in memory.
        return (codec.moments(to_device(pixels[None], self.device)) for pixels in batch.pixels)


def _gathered(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """All-gather rows over the ranks of an axis, end to end, without gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=axis.group)
    return out
