"""From a packed batch to the tensors of one stage: dispatch of rows, encoding and noising of images.

Legend: see `model.inputs`; L latent tokens and V ViT patches of the whole pack, in token order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megabagel_kernels.flow import LatentImages, NoisedRows, noised

from megabagel.config.schema import Config
from megabagel.model.factory import LayerFactory
from megabagel.model.flow import timestep
from megabagel.model.inputs import LatentInputs, Rope, StageInputs, VitInputs
from megabagel.model.positions import rope_tables
from megabagel.model.vae import Codec
from megabagel.parallel.attention import HOST, AttentionEngine, attend_across, join_over_cp
from megabagel.parallel.attention_plans import Planner, VitShares
from megabagel.parallel.mesh import Axis, Mesh
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.images import index_latents, shares, vae_images, vit_images
from megabagel.sequence.pack import Pack
from megabagel.sequence.sample import LATENT, TEXT, VIT


@dataclass(frozen=True)
class Drive:
    """Latents from outside instead of encoded images, for samplers: x_t of every latent token, and one timestep."""

    x_t_LC: torch.Tensor
    time: float


@dataclass(frozen=True)
class Given:
    """Latents and noise from outside instead of encoded images and keyed noise, to compare with another program."""

    x0_LC: torch.Tensor
    eps_LC: torch.Tensor


class InputBuilder:
    """Builds StageInputs for this rank. Without a codec all latents are given from outside."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        factory: LayerFactory,
        codec: Codec | None,
        device: torch.device,
        attention: AttentionEngine = HOST,
    ) -> None:
        self.config, self.mesh, self.factory = config, mesh, factory
        self.codec, self.device, self.attention = codec, device, attention
        self.planned = Planner.of(config, mesh, attention)

    def build(self, batch: PackedBatch, outside: Drive | Given | None = None) -> StageInputs:
        """Tensors of one micro-batch. With a `Drive`, noised images take its latents and clean ones are not allowed."""
        batch = self.planned(batch)
        assert batch.plans is not None
        pack, layout, cp = batch.pack, batch.layout, self.mesh.cp
        token_C, border = layout.rank(cp.rank), layout.num_und[cp.rank]
        first, last = self.mesh.pp.first, self.mesh.pp.last
        position_C = np.where(token_C >= 0, pack.position_S[token_C], 0)
        model = self.config.model
        rope = rope_tables(self._tensor(position_C), model.kv_channels, model.rope_base, model.rope_precision)
        word_U, is_word_U = self._words(batch, token_C[:border])
        targets = np.flatnonzero((token_C[:border] >= 0) & pack.ce_S[token_C[:border]]) if last else np.arange(0)
        return StageInputs(
            attend=attend_across(batch.plans.layers, self.attention, cp),
            rope=Rope(*rope),
            word_U=word_U,
            is_word_U=is_word_U,
            vit=self._vit(batch, token_C[:border]) if first and self.config.model.visual_und else None,
            latents=self._latents(batch, token_C[border:], outside) if first else None,
            ce_row_K=self._tensor(targets),
            label_K=self._tensor(batch.words.numpy()[pack.fill_S[token_C[targets]] + 1]),
            source_K=self._tensor(self._sources(pack, token_C[targets])),
            source_g=self.factory.share(self._tensor(self._sources(pack, token_C[border:]))),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _words(self, batch: PackedBatch, token_U: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pack = batch.pack
        is_word_U = (token_U >= 0) & (pack.kind_S[token_U] == TEXT)
        word_U = np.where(is_word_U, batch.words.numpy()[np.where(is_word_U, pack.fill_S[token_U], 0)], 0)
        return self._tensor(word_U), self._tensor(is_word_U)

    def _sources(self, pack: Pack, token_T: np.ndarray) -> np.ndarray:
        """Number of each row's source in `data.sources`; rows of none (padding, prompts) get the number after them."""
        names = [source.name for source in self.config.data.sources]
        of_sample = [names.index(s.key.source) if s.key.source in names else len(names) for s in pack.samples]
        return np.where(token_T >= 0, np.array(of_sample)[pack.sample_S[token_T]], len(names))

    def _vit(self, batch: PackedBatch, token_U: np.ndarray) -> VitInputs:
        """Images of this context-parallel rank, and padding (see `VitShares`)."""
        pack, config, cp = batch.pack, self.config.model, self.mesh.cp
        split, plans = VitShares.of(pack, cp.size), batch.plans
        assert plans is not None
        images = [image for _, image in vit_images(pack)]
        grids = [grid_ids(image.rows, image.cols, config.vit.grid, config.interpolate_pos) for image in images]
        padding = split.padding(cp.rank)
        none = torch.zeros(padding, 3 * config.vit.patch**2, device=self.device)
        patches = torch.cat([*(image.to(self.device) for image in batch.patches), none])
        grid_P = np.concatenate([*(grids[i] for i in split.dealt[cp.rank]), np.zeros(padding, np.int64)])
        source_V = self._order_after_join(split.sizes, split.dealt, split.rows)
        row_U = np.where((token_U >= 0) & (pack.kind_S[token_U] == VIT), pack.fill_S[token_U], -1)
        return VitInputs(
            patches=patches,
            grid=self._tensor(grid_P),
            grid_all=self._tensor(np.concatenate([np.zeros(0, np.int64), *grids])),
            row_U=self._tensor(row_U),
            attend=attend_across(plans.vit, self.attention),
            collect=lambda encoded: join_over_cp(encoded, cp)[source_V],
        )

    def _order_after_join(self, sizes: list[int], dealt: list[list[int]], rows: int) -> torch.Tensor:
        """Where each image's tokens lie once every rank's `rows` rows stand end to end, in token order."""
        start = {}
        for rank, part in enumerate(dealt):
            at = rank * rows
            for image in part:
                start[image] = at
                at += sizes[image]
        return self._tensor(
            np.concatenate([np.zeros(0, np.int64), *(start[i] + np.arange(size) for i, size in enumerate(sizes))])
        )

    def _latents(self, batch: PackedBatch, token_G: np.ndarray, outside: Drive | Given | None) -> LatentInputs:
        pack, config, index = batch.pack, self.config.model, index_latents(batch.pack)
        of_latent_G = (token_G >= 0) & (pack.kind_S[token_G] == LATENT)
        real_g = self.factory.share(self._tensor(of_latent_G))
        latent_g = self.factory.share(self._tensor(np.where(of_latent_G, pack.fill_S[token_G], 0)))
        if not pack.latents:
            return self._no_latents(len(real_g))
        image_g = self._tensor(index.image_L)[latent_g]
        grids = [grid_ids(i.rows, i.cols, config.latent_grid, config.interpolate_pos) for i in pack.latents]
        noised_I = self._tensor(np.array([image.noised for image in pack.latents]))
        time_I = self._times(pack, outside)
        if isinstance(outside, Drive):
            x_t_gC = outside.x_t_LC.to(self.device)[latent_g] * real_g[:, None]
            rows = NoisedRows(x_t_gC, torch.zeros_like(x_t_gC), real_g)
        elif isinstance(outside, Given):
            x0_gC, eps_gC = (x.to(self.device)[latent_g] for x in (outside.x0_LC, outside.eps_LC))
            rows = noised(x0_gC, eps_gC, time_I[image_g], real_g)
        else:
            place_g = self._tensor(index.place_L)[latent_g]
            images = self._noised_images(batch, time_I)
            rows = self.factory.kernels.noised_rows(images, torch.where(real_g, image_g, -1), place_g)
        return LatentInputs(
            x_t_gC=rows.x_t_GC,
            target_gC=rows.target_GC,
            weight_g=(rows.real_G & noised_I[image_g]).float(),  # a lost image is not real: its rows stay, without loss
            grid_g=self._tensor(np.concatenate(grids))[latent_g] * rows.real_G,
            time_I=time_I,
            image_g=image_g * rows.real_G,
        )

    def _times(self, pack: Pack, outside: Drive | Given | None) -> torch.Tensor:
        """Timesteps of the latent images."""
        if isinstance(outside, Drive):
            return torch.full((len(pack.latents),), outside.time, device=self.device)
        raw_I = torch.tensor([image.raw_timestep for image in pack.latents], device=self.device)
        return timestep(raw_I, self.config.train.timestep_shift, self.config.train.timestep_precision)

    def _noised_images(self, batch: PackedBatch, time_I: torch.Tensor) -> LatentImages:
        """Every use of an image's latents: where they lie, and how they are noised."""
        config, latents, index = self.config.model, batch.pack.latents, index_latents(batch.pack)
        return LatentImages(
            cells=self._encode(batch).flatten(),
            start_I=self._tensor(index.x0_L[index.place_L == 0] * config.latent_dim),
            height_I=self._tensor(np.array([image.rows * config.latent_patch for image in latents])),
            width_I=self._tensor(np.array([image.cols * config.latent_patch for image in latents])),
            time_I=time_I,
            seed_I=torch.tensor([image.noise_seed for image in latents], device=self.device),
            channels=config.latent_dim // config.latent_patch**2,
            patch=config.latent_patch,
        )

    def _no_latents(self, rows: int) -> LatentInputs:
        """Padding rows alone: the generation expert still runs on them."""
        none = torch.zeros(rows, self.config.model.latent_dim, device=self.device)
        zero = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return LatentInputs(none, none, none[:, 0], zero, torch.zeros(1, device=self.device), zero)

    def _encode(self, batch: PackedBatch) -> torch.Tensor:
        """Latents of every distinct image, each [channels, height, width] in rows of C numbers, end to end.

        Each rank of the stage encodes its share.
        """
        pack, stage, width = batch.pack, self.mesh.tp_cp, self.config.model.latent_dim
        assert self.codec is not None
        images = vae_images(pack)
        sizes = [image.tokens for image in images]
        dealt = shares(sizes, stage.size)
        cells = [torch.zeros(0, width, device=self.device)]
        for number, moments_1MHW in zip(dealt[stage.rank], self._moments(batch), strict=True):
            seed = self._posterior_seed(pack, images[number].sample, images[number].slot)
            cells.append(self.codec.draw(moments_1MHW, [seed])[0].reshape(-1, width))
        own = torch.cat(cells)
        rows = max(sum(sizes[i] for i in part) for part in dealt)
        own = torch.nn.functional.pad(own, (0, 0, 0, rows - len(own)))
        return _join(own, stage)[self._order_after_join(sizes, dealt, rows)]

    def _moments(self, batch: PackedBatch) -> Iterator[torch.Tensor]:
        """The codec's moments of every image that this rank encodes: cached, or from pixels."""
        assert self.codec is not None
        if batch.moments is not None:
            return (cached[None].to(self.device) for cached in batch.moments)
        return (self.codec.moments(pixels[None].to(self.device)) for pixels in batch.pixels)

    @staticmethod
    def _posterior_seed(pack: Pack, sample: int, slot: int) -> int:
        return pack.samples[sample].key.seed64("posterior", slot)


def _join(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Rows of every rank end to end, without gradient."""
    if axis.size == 1:
        return x
    out = x.new_empty(axis.size * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous(), group=axis.group)
    return out
