"""Index arrays of one rank for one pack: token ids, RoPE ids, grid ids, labels and image indices per row.

A rank holds some rows of the pack (`sequence.layout`), encodes its share of the images and computes losses on some
rows. All index arrays for that follow from the pack, the layout and the rank's place in the grid. They are computed
once, in NumPy, in a loader worker; the training process (`parallel.inputs`) only copies them to the device, encodes
images and adds noise.

Shape letters: T rows of this context-parallel rank, [und | gen]; U and G its und and gen rows; g this tensor-parallel
rank's share of G; P ViT patches that this rank encodes; L latent tokens and I latent images of the pack; Q rows with
cross-entropy; S tokens of the pack in sequence order.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np

from megabagel.config.schema import Config
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.images import (
    ImageShares,
    VaeImage,
    index_latents,
    vae_images,
    vae_shares,
    vit_images,
    vit_shares,
)
from megabagel.sequence.items import Vit
from megabagel.sequence.layout import Layout, build_layout, layout_rows
from megabagel.sequence.pack import Pack
from megabagel.sequence.sample import TEXT, VIT

A = TypeVar("A")
"""Array type of a record: `np.ndarray` in the worker, `torch.Tensor` on the device, `Span` for places in a buffer."""


@dataclass(frozen=True)
class RankPlace:
    """A rank's indices on the tensor- and context-parallel axes, and whether it holds an end of the pipeline."""

    tp: int = 0
    cp: int = 0
    first: bool = True
    """Whether the rank is in the first pipeline stage, which embeds tokens and encodes images."""
    last: bool = True
    """Whether the rank is in the last pipeline stage, which computes losses."""

    def share(self, rows: np.ndarray, row_shards: int) -> np.ndarray:
        """Return this tensor-parallel rank's share of rows under sequence parallelism.

        Args:
            rows: rows of the context-parallel rank.
            row_shards: `ParallelConfig.row_shards`: tp with sequence parallelism, 1 without.
        """
        # With row_shards = 1 the remainder is 0 for every rank: all of them hold all rows.
        return np.split(rows, row_shards)[self.tp % row_shards]


@dataclass(frozen=True)
class RankPack:
    """A pack laid out for one rank: its rows, and the images that it encodes."""

    pack: Pack
    layout: Layout
    place: RankPlace
    vit: ImageShares
    """ViT images of every context-parallel rank."""
    vae: ImageShares
    """VAE images of every rank (tp x cp) of the first pipeline stage."""
    vae_rank: int
    """This rank's index in `vae`."""

    @classmethod
    def of(cls, pack: Pack, config: Config, place: RankPlace) -> "RankPack":
        """Lay `pack` out for the rank at `place` in the grid of `config`."""
        grid = config.parallel
        layout = build_layout(pack, layout_rows(config.data.max_tokens, grid.chunk, grid.cp), grid.chunk, grid.cp)
        vit, vae = vit_shares(pack, grid.cp), vae_shares(pack, grid.cp * grid.tp)
        # The index is this rank's place in megatron-core's tensor-and-context group, whose order `Mesh.place` asserts.
        return cls(pack, layout, place, vit, vae, place.cp * grid.tp + place.tp)

    @cached_property
    def vit_images(self) -> list[tuple[int, Vit]]:
        """(sample number, image) of every ViT image that this rank encodes; empty outside of the first stage."""
        images = vit_images(self.pack)
        return [images[i] for i in self.vit.dealt[self.place.cp]] if self.place.first else []

    @cached_property
    def vae_images(self) -> list[VaeImage]:
        """Images that this rank encodes with the VAE; empty outside of the first stage."""
        images = vae_images(self.pack)
        return [images[i] for i in self.vae.dealt[self.vae_rank]] if self.place.first else []


@dataclass(frozen=True)
class VitRows(Generic[A]):
    """ViT patches that a rank encodes, and the und rows that receive the pack's patches."""

    grid: A
    """[P] int64 ids in the ViT's learned position table, for the patches that this rank encodes; 0 in padding."""
    grid_all: A
    """int64 ids in the language model's frozen position table, for every patch of the pack in token order."""
    gathered_row: A
    """int64, for every patch of the pack its row after the all-gather of all context-parallel ranks' P rows."""
    row_U: A
    """[U] int64: index of the pack's patch that a row takes; -1 for text and padding."""


@dataclass(frozen=True)
class LatentRows(Generic[A]):
    """Latent tokens of a rank's gen rows, and the latent images of the pack."""

    image_g: A
    """[g] int64 index of the row's latent image; -1 in padding."""
    place_g: A
    """[g] int64 row-major number of the token inside its image; 0 in padding."""
    grid_g: A
    """[g] int64 ids in the frozen position table; 0 in padding."""
    weight_g: A
    """[g] fp32 weight of the row in the flow loss; 0 for clean images and padding."""
    constraint: "ConstraintRows[A] | None"
    """None where no image of the pack has a second target."""
    raw_time_I: A
    """[I] fp32 normal draw u behind each timestep (docs/bagel.md#flow-time); -inf for a clean image."""
    seed_I: A
    """[I] int64 seed of each image's noise."""
    start_I: A
    """[I] int64 offset of the image's latent, in numbers, in the flat tensor of all encoded images end to end."""
    height_I: A
    """[I] int64 height of the latent in cells (before patching into tokens)."""
    width_I: A
    """[I] int64 width of the latent in cells."""
    gathered_row: A
    """int64, for every token of the encoded images its row after the all-gather of all ranks' `encoded_rows` rows."""
    encoded_rows: int
    """Rows that each rank of the stage contributes to the all-gather: the largest share."""
    posterior_seeds: tuple[int, ...]
    """Seed of the VAE's posterior draw for each image that this rank encodes."""


@dataclass(frozen=True)
class LatentWeights:
    """Weights of the pack's latent tokens in the flow loss, multiplied with 0 for clean images (SRUM equation 3).

    Losses are divided by counts of tokens, not by sums of weights.
    """

    flow_L: np.ndarray
    """[L] weight of the squared error to the velocity eps - x_0."""
    constraint_L: np.ndarray | None = None
    """[L] weight of the squared error to the second target; None: no image has one."""


@dataclass(frozen=True)
class ConstraintRows(Generic[A]):
    """The second flow target of a rank's gen rows: eps - x_0' of another image with the same noise."""

    weight_g: A
    """[g] fp32 weight; 0 where the row has no second target."""
    start_I: A
    """[I] int64 as `LatentRows.start_I`, of the second target's image."""


@dataclass(frozen=True)
class RankRows(Generic[A]):
    """Index arrays of one rank for one pack."""

    position_T: A
    """[T] int32 RoPE ids; 0 in padding."""
    token_id_U: A
    """[U] int64 token ids; 0 where the row is not text."""
    is_text_U: A
    """[U] bool."""
    latent_g: A
    """[g] int64 index of the row's latent token among those of the pack; -1 in padding."""
    ce_row_Q: A
    """[Q] int64 indices (in U) of rows with cross-entropy; empty outside of the last stage."""
    label_Q: A
    """[Q] int64 next-token labels of these rows."""
    source_Q: A
    """[Q] int64 index of the row's data source in `data.sources`; len(data.sources) for samples of no source."""
    source_g: A
    """[g] int64, the same for gen rows."""
    vit: VitRows[A] | None
    """None outside of the first stage, or without a ViT."""
    latents: LatentRows[A] | None
    """None outside of the first stage."""


def derive_rows(
    rank: RankPack, config: Config, token_ids: np.ndarray, weights: LatentWeights | None = None
) -> RankRows[np.ndarray]:
    """Compute the index arrays of one rank.

    Args:
        rank: the pack, laid out for the rank.
        config: sizes of the model, grid, data sources.
        token_ids: int64 ids of every text token of the pack in token order, delimiters included.
        weights: of the latent tokens in the flow loss; None: 1 for each.
    """
    pack, place = rank.pack, rank.place
    token_U, token_G = rank.layout.split(place.cp)
    token_g = place.share(token_G, config.parallel.row_shards)
    is_text_U = _take(pack.kind_S, token_U, VIT) == TEXT
    latent_g = _take(pack.fill_S, token_g, -1)
    ce_row_Q = np.flatnonzero(_take(pack.ce_S, token_U, False)) if place.last else np.zeros(0, np.int64)
    token_Q, source_S = token_U[ce_row_Q], _sources(pack, config)
    # label_Q: a row with cross-entropy is never the last of its text (docs/bagel.md#samples), so the pack's next text
    # token is the next token of the same text.
    return RankRows(
        position_T=_take(pack.position_S, rank.layout.rank(place.cp), 0),
        token_id_U=_take(token_ids, np.where(is_text_U, _take(pack.fill_S, token_U, -1), -1), 0),
        is_text_U=is_text_U,
        latent_g=latent_g,
        ce_row_Q=ce_row_Q,
        label_Q=token_ids[pack.fill_S[token_Q] + 1],
        source_Q=source_S[token_Q],
        source_g=_take(source_S, token_g, len(config.data.sources)),
        vit=_vit_rows(rank, config, token_U) if place.first and config.model.visual_und else None,
        latents=_latent_rows(rank, config, token_g, latent_g, weights) if place.first else None,
    )


def _take(values: np.ndarray, index: np.ndarray, padding: int | float) -> np.ndarray:
    """Return `values[index]`, with `padding` where the index is -1."""
    return np.append(values, values.dtype.type(padding))[index]


def _sources(pack: Pack, config: Config) -> np.ndarray:
    """Return [S] int64 index of each token's data source; tokens of no source (prompts) get len(data.sources)."""
    number = {source.name: n for n, source in enumerate(config.data.sources)}
    of_sample = [number.get(sample.key.source, len(number)) for sample in pack.samples]
    return np.array(of_sample, np.int64)[pack.sample_S]


def _vit_rows(rank: RankPack, config: Config, token_U: np.ndarray) -> VitRows[np.ndarray]:
    pack, model = rank.pack, config.model
    images = (image for _, image in vit_images(pack))
    grids = (grid_ids(image.rows, image.cols, model.vit.grid, model.interpolate_pos) for image in images)
    grid_all = np.concatenate([np.zeros(0, np.int64), *grids])
    own = rank.vit.tokens(rank.place.cp)
    return VitRows(
        grid=np.pad(grid_all[own], (0, rank.vit.rows - len(own))),
        grid_all=grid_all,
        gathered_row=rank.vit.gathered_row(),
        row_U=np.where(_take(pack.kind_S, token_U, TEXT) == VIT, _take(pack.fill_S, token_U, -1), -1),
    )


def _latent_rows(
    rank: RankPack, config: Config, token_g: np.ndarray, latent_g: np.ndarray, weights: LatentWeights | None
) -> LatentRows[np.ndarray]:
    pack, model = rank.pack, config.model
    images, index = pack.latents, index_latents(pack)
    grids = (grid_ids(image.rows, image.cols, model.latent_grid, model.interpolate_pos) for image in images)
    noised_g = weight_g = _take(pack.noised_S, token_g, False).astype(np.float32)
    constraint = None
    if weights is not None:
        assert len(weights.flow_L) == len(index.image_L), (len(weights.flow_L), len(index.image_L))
        weight_g = noised_g * _take(weights.flow_L.astype(np.float32), latent_g, 0)
        if weights.constraint_L is not None:
            second_g = noised_g * _take(weights.constraint_L.astype(np.float32), latent_g, 0)
            constraint = ConstraintRows(second_g, index.constraint_start_I * model.latent_dim)
    return LatentRows(
        image_g=_take(index.image_L, latent_g, -1),
        place_g=_take(index.place_L, latent_g, 0),
        grid_g=_take(np.concatenate([np.zeros(0, np.int64), *grids]), latent_g, 0),
        weight_g=weight_g,
        constraint=constraint,
        raw_time_I=np.array([image.raw_timestep for image in images], np.float32),
        seed_I=np.array([image.noise_seed for image in images], np.int64),
        start_I=index.start_I * model.latent_dim,
        height_I=np.array([image.rows * model.latent_patch for image in images], np.int64),
        width_I=np.array([image.cols * model.latent_patch for image in images], np.int64),
        gathered_row=rank.vae.gathered_row(),
        encoded_rows=rank.vae.rows,
        posterior_seeds=tuple(pack.samples[i.sample].key.seed64("posterior", i.slot) for i in rank.vae_images),
    )
