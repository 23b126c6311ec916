"""From a packed batch to the tensors of one stage: dispatch of rows, encoding and noising of images.

Legend: see `model.inputs`; L latent tokens and V ViT patches of the whole pack, in token order.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megabagel_kernels.flow import noise_latents
from megabagel_kernels.philox import noise_rows

from megabagel.config.schema import Config
from megabagel.model.factory import LayerFactory
from megabagel.model.flow import timestep
from megabagel.model.inputs import LatentInputs, Rope, StageInputs, VitInputs
from megabagel.model.positions import rope_tables
from megabagel.model.vae import Codec
from megabagel.parallel.attention import HOST, AttentionEngine, attend_across, join_over_cp
from megabagel.parallel.topology import Axis, Topology
from megabagel.sequence.batch import PackedBatch
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.images import index_latents, shares, vae_images, vit_images
from megabagel.sequence.items import Mode
from megabagel.sequence.pack import Pack, mask_codes
from megabagel.sequence.patches import patchify
from megabagel.sequence.sample import LATENT, TEXT, VIT, Split


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
        topology: Topology,
        factory: LayerFactory,
        codec: Codec | None,
        device: torch.device,
        attention: AttentionEngine = HOST,
    ) -> None:
        self.config, self.topology, self.factory = config, topology, factory
        self.codec, self.device, self.attention = codec, device, attention

    def build(self, batch: PackedBatch, outside: Drive | Given | None = None) -> StageInputs:
        """Tensors of one micro-batch. With a `Drive`, noised images take its latents and clean ones are not allowed."""
        pack, layout, cp = batch.pack, batch.layout, self.topology.cp
        token_C, border = layout.rank(cp.rank), layout.borders[cp.rank]
        first, last = self.topology.pp.first, self.topology.pp.last
        position_C = np.where(token_C >= 0, pack.position_S[token_C], 0)
        model = self.config.model
        rope = rope_tables(self._tensor(position_C), model.kv_channels, model.rope_base, model.rope_precision)
        word_U, is_word_U = self._words(batch, token_C[:border])
        targets = np.flatnonzero((token_C[:border] >= 0) & pack.ce_S[token_C[:border]]) if last else np.arange(0)
        return StageInputs(
            attend=attend_across(layout.codes(pack, cp.rank), self.attention, model.kv_channels, cp),
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
        """Images of this context-parallel rank, padded to the largest share so that ranks exchange equal shapes.

        One padding patch at least keeps the tower in the graph of a pack without images.
        """
        pack, config, cp = batch.pack, self.config.model, self.topology.cp
        images = [image for _, image in vit_images(pack)]
        sizes = [image.rows * image.cols for image in images]
        grids = [grid_ids(image.rows, image.cols, config.vit.grid, config.interpolate_pos) for image in images]
        dealt = shares(sizes, cp.size)
        rows = max(1, *(sum(sizes[i] for i in part) for part in dealt))
        mine = dealt[cp.rank]
        codes = mask_codes([[Split(Mode.FULL, sizes[i])] for i in mine])
        padding = rows - sum(sizes[i] for i in mine)
        patches = torch.cat([*batch.patches, torch.zeros(padding, 3 * config.vit.patch**2)])
        grid_P = np.concatenate([*(grids[i] for i in mine), np.zeros(padding, np.int64)])
        source_V = self._order_after_join(sizes, dealt, rows)
        row_U = np.where((token_U >= 0) & (pack.kind_S[token_U] == VIT), pack.fill_S[token_U], -1)
        return VitInputs(
            patches=patches.to(self.device),
            grid=self._tensor(grid_P),
            grid_all=self._tensor(np.concatenate([np.zeros(0, np.int64), *grids])),
            row_U=self._tensor(row_U),
            attend=attend_across(codes.padded(padding), self.attention, config.vit.hidden // config.vit.heads),
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
        pack, config = batch.pack, self.config
        share = self.factory.share
        index = index_latents(pack)
        token_G = np.where((token_G >= 0) & (pack.kind_S[token_G] == LATENT), token_G, -1)
        real_g = share(self._tensor(token_G >= 0))
        latent_g = share(self._tensor(np.where(token_G >= 0, pack.fill_S[token_G], 0)))
        if not pack.latents:
            return self._no_latents(len(real_g))
        image_g = self._tensor(index.image_L)[latent_g]
        grids = [grid_ids(i.rows, i.cols, config.model.latent_grid, config.model.interpolate_pos) for i in pack.latents]
        noised_I = self._tensor(np.array([image.noised for image in pack.latents]))
        if isinstance(outside, Drive):
            time_I = torch.full((len(pack.latents),), outside.time, device=self.device)
            x_t_gC = outside.x_t_LC.to(self.device)[latent_g]
            target_gC = torch.zeros_like(x_t_gC)
        else:
            raw_I = torch.tensor([image.raw_timestep for image in pack.latents], device=self.device)
            time_I = timestep(raw_I, config.train.timestep_shift, config.train.timestep_precision)
            x0_gC, eps_gC = self._ends(batch, latent_g, image_g, outside)
            real_g &= x0_gC.isfinite().all(1)  # a lost image has NaN latents: its rows stay, without loss
            x0_gC = x0_gC.nan_to_num()
            x_t_gC, target_gC = noise_latents(x0_gC, eps_gC, time_I[image_g]), eps_gC - x0_gC
        return LatentInputs(
            x_t_gC=x_t_gC * real_g[:, None],
            target_gC=target_gC * real_g[:, None],
            weight_g=(real_g & noised_I[image_g]).float(),
            grid_g=self._tensor(np.concatenate(grids))[latent_g] * real_g,
            time_I=time_I,
            image_g=image_g * real_g,
        )

    def _ends(
        self, batch: PackedBatch, latent_g: torch.Tensor, image_g: torch.Tensor, given: Given | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two ends of the flow for rows that hold latent tokens `latent_g` of images `image_g`: x_0 and noise."""
        if given is not None:
            return given.x0_LC.to(self.device)[latent_g], given.eps_LC.to(self.device)[latent_g]
        index = index_latents(batch.pack)
        seed_I = torch.tensor([image.noise_seed for image in batch.pack.latents], device=self.device)
        place_g = self._tensor(index.place_L)[latent_g]
        x0_gC = self._encode(batch)[self._tensor(index.x0_L)[latent_g]]
        return x0_gC, noise_rows(seed_I[image_g], place_g, self.config.model.latent_dim)

    def _no_latents(self, rows: int) -> LatentInputs:
        """Padding rows alone: the generation expert still runs on them."""
        none = torch.zeros(rows, self.config.model.latent_dim, device=self.device)
        zero = torch.zeros(rows, dtype=torch.int64, device=self.device)
        return LatentInputs(none, none, none[:, 0], zero, torch.zeros(1, device=self.device), zero)

    def _encode(self, batch: PackedBatch) -> torch.Tensor:
        """x_0 of every distinct image, [tokens, C] end to end; each rank of the stage encodes its share."""
        pack, stage = batch.pack, self.topology.tp_cp
        assert self.codec is not None
        images = vae_images(pack)
        sizes = [image.tokens for image in images]
        dealt = shares(sizes, stage.size)
        mine = [images[i] for i in dealt[stage.rank]]
        tokens = [
            patchify(
                self.codec.encode(pixels[None].to(self.device), [self._posterior_seed(pack, image.sample, image.slot)])[
                    0
                ],
                self.config.model.latent_patch,
            )
            for image, pixels in zip(mine, batch.pixels, strict=True)
        ]
        rows = max(sum(sizes[i] for i in part) for part in dealt)
        own = torch.cat([*tokens, torch.zeros(0, self.config.model.latent_dim, device=self.device)])
        own = torch.nn.functional.pad(own, (0, 0, 0, rows - len(own)))
        return _join(own, stage)[self._order_after_join(sizes, dealt, rows)]

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
