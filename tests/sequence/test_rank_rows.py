"""The rows of every rank of a grid against the pack's tokens one by one, and the buffer that they travel in."""

import pickle
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, SourceConfig, VitConfig
from megabagel.sequence.batch import PackedRows
from megabagel.sequence.images import vae_images
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.one_buffer import ALIGNMENT, Span, map_fields
from megabagel.sequence.rank_rows import LatentRows, LatentWeights, RankPack, RankPlace, RankRows, VitRows, derive_rows
from tests.support.oracle import Token
from tests.support.strategies import Drawn, examples, lay_end_to_end, packs

GRID = 5
"""Cells per side of both position tables."""

GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 2), st.booleans())
"""cp, tp, sp."""


def config_of(drawn: Drawn, cp: int, tp: int, sp: bool) -> Config:
    """Both tables are stretched: ids depend on the size of an image."""
    model = ModelConfig(latent_grid=GRID, interpolate_pos=True, vit=VitConfig(grid=GRID))
    sources = (SourceConfig("other", "none.tar"), SourceConfig("drawn", "none.tar"))
    data = DataConfig(max_tokens=drawn.pack.tokens + 8, sources=sources)
    return Config(model=model, data=data, parallel=ParallelConfig(tp=tp, cp=cp, sp=sp, chunk=4))


class Expected:
    """The tokens of a pack as numbers: ids of text tokens are 100, 101, ..., weights of latent tokens 1, 2, ..."""

    def __init__(self, drawn: Drawn) -> None:
        self.tokens: list[Token] = [token for sample in drawn.tokens for token in sample]
        self.number = [sum(t.kind == token.kind for t in self.tokens[:i]) for i, token in enumerate(self.tokens)]
        """Of a token among those of its kind."""
        starts = [token.kind == "latent" and token.image[1] == 0 for token in self.tokens]
        self.image = np.cumsum(starts) - 1
        """Of a latent token."""
        self.token_ids = 100 + np.arange(sum(token.kind == "word" for token in self.tokens))
        self.weight_L = 1.0 + np.arange(sum(token.kind == "latent" for token in self.tokens))
        images = [image for items in drawn.items for item in items for image in getattr(item, "frames", (item,))]
        self.latents = [image for image in images if isinstance(image, Latent)]
        self.vits = [image for image in images if isinstance(image, Vit)]

    def of(self, rows: np.ndarray, kind: str) -> list[Token | None]:
        """The token of every row, if it is of this kind."""
        return [self.tokens[row] if row >= 0 and self.tokens[row].kind == kind else None for row in rows]


def cell(image: Latent | Vit, place: int) -> int:
    """Id of a token in a table that is stretched over its image."""
    row, col = divmod(place, image.cols)
    return row * GRID // image.rows * GRID + col * GRID // image.cols


@examples(60)
@given(packs(), GRIDS, st.booleans())
def test_every_rank_knows_its_tokens(drawn: Drawn, grid: tuple[int, int, bool], weighted: bool) -> None:
    config, right, (cp, tp, sp) = config_of(drawn, *grid), Expected(drawn), grid
    weights = LatentWeights(right.weight_L) if weighted else None
    for c in range(cp):
        shares = []
        for t in range(tp):
            rank = RankPack.of(drawn.pack, config, RankPlace(t, c))
            rows = derive_rows(rank, config, right.token_ids, weights)
            border = rank.layout.num_und[c]
            token_U, token_G = rank.layout.rank(c)[:border], rank.layout.rank(c)[border:]
            check_und(rows, token_U, right)
            position = [right.tokens[row].position if row >= 0 else 0 for row in (*token_U, *token_G)]
            assert rows.position_T.tolist() == position
            token_g = token_G.reshape(tp, -1)[t] if sp else token_G
            check_gen(rows, token_g, right, weighted)
            shares += token_g.tolist()
        assert shares == (token_G.tolist() if sp else token_G.tolist() * tp)


def check_und(rows: RankRows[np.ndarray], token_U: np.ndarray, right: Expected) -> None:
    texts, patches = right.of(token_U, "word"), right.of(token_U, "patch")
    assert rows.is_text_U.tolist() == [token is not None for token in texts]
    numbers = [right.number[row] for row in token_U]
    assert rows.token_id_U.tolist() == [100 + n if t else 0 for t, n in zip(texts, numbers, strict=True)]
    assert rows.vit is not None
    assert rows.vit.row_U.tolist() == [n if t else -1 for t, n in zip(patches, numbers, strict=True)]
    learned = [row for row, token in enumerate(texts) if token is not None and token.label]
    assert rows.ce_row_Q.tolist() == learned
    assert rows.label_Q.tolist() == [100 + right.number[token_U[row] + 1] for row in learned]
    assert rows.source_Q.tolist() == [1] * len(learned)


def check_gen(rows: RankRows[np.ndarray], token_g: np.ndarray, right: Expected, weighted: bool) -> None:
    latents = rows.latents
    assert latents is not None and latents.weight_g.dtype == np.float32
    assert rows.source_g.tolist() == [1 if row >= 0 else 2 for row in token_g]
    for row, token in enumerate(right.of(token_g, "latent")):
        found = (rows.latent_g[row], latents.image_g[row], latents.place_g[row], latents.grid_g[row])
        if token is None:
            assert token_g[row] == -1 and found == (-1, -1, 0, 0) and latents.weight_g[row] == 0
            continue
        number, image = right.number[token_g[row]], right.image[token_g[row]]
        assert found == (number, image, token.image[1], cell(right.latents[image], token.image[1]))
        assert latents.weight_g[row] == token.flow * (right.weight_L[number] if weighted else 1)


@examples(40)
@given(packs(), GRIDS)
def test_encoded_images_are_found_after_the_gather(drawn: Drawn, grid: tuple[int, int, bool]) -> None:
    """Every rank encodes its images to (kind, image, place) of their tokens; rows are gathered, and picked in order."""
    config, right, (cp, tp, _) = config_of(drawn, *grid), Expected(drawn), grid
    made = {
        (c, t): (rank, derive_rows(rank, config, right.token_ids))
        for c, t in product(range(cp), range(tp))
        for rank in [RankPack.of(drawn.pack, config, RankPlace(t, c))]
    }
    distinct = vae_images(drawn.pack)
    encoded, seeds = [], {}
    for rank, rows in made.values():
        own = [(distinct.index(image), place) for image in rank.vae_images for place in range(image.tokens)]
        encoded += own + [(-1, -1)] * (_latents(rows).encoded_rows - len(own))
        seeds |= dict(zip(map(distinct.index, rank.vae_images), _latents(rows).posterior_seeds, strict=True))
    cells = [(number, place) for number, image in enumerate(distinct) for place in range(image.tokens)]
    keys = [drawn.pack.samples[image.sample].key for image in distinct]
    assert seeds == {n: keys[n].seed64("posterior", image.slot) for n, image in enumerate(distinct)}
    for _, rows in made.values():
        latents, width = _latents(rows), config.model.latent_dim
        assert [encoded[row] for row in latents.gathered_row] == cells
        patch = config.model.latent_patch
        for number, image in enumerate(drawn.pack.latents):
            assert (latents.height_I[number], latents.width_I[number]) == (image.rows * patch, image.cols * patch)
            first, place = cells[latents.start_I[number] // width]
            assert distinct[first].slot == image.slot and place == 0 and latents.start_I[number] % width == 0
            assert latents.seed_I[number] == image.noise_seed
            assert latents.raw_time_I[number] == np.float32(image.raw_timestep)
    features, grids = [], []
    for rank, rows in (made[c, 0] for c in range(cp)):
        own = [(number, place) for number, place in _patches(right.vits) if number in rank.vit.dealt[rank.place.cp]]
        features += own + [(-1, -1)] * (len(_vit(rows).grid) - len(own))
        grids += _vit(rows).grid.tolist()
    ids = [cell(right.vits[number], place) for number, place in _patches(right.vits)]
    assert grids == [cell(right.vits[number], place) if number >= 0 else 0 for number, place in features]
    for _, rows in made.values():
        assert [features[row] for row in _vit(rows).gathered_row] == _patches(right.vits)
        assert _vit(rows).grid_all.tolist() == ids


def _patches(images: list[Vit]) -> list[tuple[int, int]]:
    return [(number, place) for number, image in enumerate(images) for place in range(image.rows * image.cols)]


def _latents(rows: RankRows[np.ndarray]) -> LatentRows[np.ndarray]:
    assert rows.latents is not None
    return rows.latents


def _vit(rows: RankRows[np.ndarray]) -> VitRows[np.ndarray]:
    assert rows.vit is not None
    return rows.vit


MIXED: list[list[Item]] = [
    [Text(0, 5, loss=True), Latent(1, 2, 3, noised=True), Latent(1, 2, 3, noised=False), Vit(1, 3, 2)],
    [Text(0, 3), Latent(1, 1, 2, noised=True)],
]


def test_stages_know_what_they_run() -> None:
    drawn = lay_end_to_end(MIXED)
    config, token_ids = config_of(drawn, 1, 1, True), Expected(drawn).token_ids

    def rows(config: Config, **ends: bool) -> RankRows[np.ndarray]:
        return derive_rows(RankPack.of(drawn.pack, config, RankPlace(**ends)), config, token_ids)

    first, middle, last = rows(config, last=False), rows(config, first=False, last=False), rows(config, first=False)
    assert first.vit is not None and first.latents is not None and len(first.ce_row_Q) == 0
    assert middle.vit is None and middle.latents is None and len(middle.ce_row_Q) == len(middle.label_Q) == 0
    assert last.vit is None and last.latents is None and len(last.ce_row_Q) == len(last.source_Q) == 6
    blind = replace(config, model=replace(config.model, visual_und=False))
    assert rows(blind).vit is None and rows(blind).latents is not None


def test_rows_travel_in_one_aligned_buffer() -> None:
    """Through a pickle too: every array is a view of the one buffer, and what was written is read."""
    drawn = lay_end_to_end(MIXED)
    config = config_of(drawn, 1, 1, True)
    rows = derive_rows(RankPack.of(drawn.pack, config, RankPlace()), config, Expected(drawn).token_ids)
    arrays: list[np.ndarray] = []
    map_fields(rows, np.ndarray, arrays.append)
    assert len(arrays) > 20 and any(array.size == 0 for array in (*arrays, np.zeros(0)))
    for packed in (PackedRows.of(rows), pickle.loads(pickle.dumps(PackedRows.of(rows)))):
        spans: list[Span] = []
        map_fields(packed.spans, Span, spans.append)
        assert all(span.start % ALIGNMENT == 0 for span in spans) and packed.buffer.data_ptr() % ALIGNMENT == 0
        views: list[np.ndarray] = []
        map_fields(packed.arrays(), np.ndarray, views.append)
        tensors: list[torch.Tensor] = []
        map_fields(packed.to(torch.device("cpu")), torch.Tensor, tensors.append)
        for array, view, tensor in zip(arrays, views, tensors, strict=True):
            assert view.dtype == array.dtype and np.array_equal(view, array) and np.array_equal(tensor.numpy(), array)
            assert tensor.untyped_storage().data_ptr() == packed.buffer.untyped_storage().data_ptr()
        assert packed.spans.latents is not None and rows.latents is not None
        assert packed.spans.latents.posterior_seeds == rows.latents.posterior_seeds


def test_a_pack_without_images_has_empty_arrays() -> None:
    drawn = lay_end_to_end([[Text(0, 4, loss=True)]])
    config = config_of(drawn, 2, 1, True)
    for cp in range(2):
        rank = RankPack.of(drawn.pack, config, RankPlace(cp=cp))
        rows = PackedRows.of(derive_rows(rank, config, Expected(drawn).token_ids)).arrays()
        assert rows.latents is not None and rows.vit is not None
        assert len(rows.latents.seed_I) == len(rows.latents.gathered_row) == len(rows.vit.grid_all) == 0
        assert (rows.latents.image_g == -1).all() and rows.vit.grid.tolist() == [0]  # a row to run the tower on
