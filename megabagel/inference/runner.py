"""Forward pass over the parts of any requests on this rank; the only file of inference that calls the model.

Rows of all parts are ordered [und | gen] and split over context-parallel ranks part by part. Every rank keeps the whole
KV cache of its layers and heads, so new keys and values are gathered while queries stay. Pipeline stages exchange
hidden states of the pass. Predictions of the last stage are broadcast, so that every rank takes the same decisions.

Results are bitwise independent of the other parts in a pass: each part has an attention plan of its own, and everything
else works row by row. An fp32 GEMM on a CPU uses another kernel for 1 to 3 rows, with different last bits, so such
blocks are padded to 4 rows.

Legend: see `model.inputs`; T = U + G rows of this rank, W rows of all context-parallel ranks, Q rows with logits.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.config.schema import ModelConfig
from megabagel.inference.cache import KVCache
from megabagel.inference.segments import Layout, Part
from megabagel.model.bagel import Bagel
from megabagel.model.inputs import Attend, Hidden, LatentInputs, Predictions, Rope, StageInputs, VitInputs
from megabagel.model.positions import rope_tables
from megabagel.parallel.attention import AttentionEngine, attend_across, join_over_cp
from megabagel.parallel.mesh import Axis
from megabagel.sampling.taylorseer import is_full
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.items import Mode
from megabagel.sequence.pack import mask_codes
from megabagel.sequence.sample import LATENT, TEXT, VIT, Segment

MIN_ROWS = 4
"""Fewest rows of a GEMM; smaller blocks are padded (see above)."""


@dataclass(frozen=True)
class Ranks:
    """The axes of the grid that a forward pass runs over; None: of size 1."""

    cp: Axis | None = None
    pp: Axis | None = None

    @property
    def cp_rank(self) -> int:
        """This rank's index on the context-parallel axis."""
        return self.cp.rank if self.cp else 0

    @property
    def cp_size(self) -> int:
        """Ranks on it."""
        return self.cp.size if self.cp else 1


@dataclass(frozen=True)
class Result:
    """Predictions of a pass for one part, fp32, equal on every rank."""

    logits_QV: Tensor
    """After the last token of every segment that wants them."""
    velocities: tuple[Tensor, ...]
    """[rows * cols, Z] of every latent image, in order; meaningless for clean images."""


class Runner:
    """Runs forward passes of one pipeline stage."""

    def __init__(
        self,
        config: ModelConfig,
        stage: Bagel,
        cache: KVCache,
        engine: AttentionEngine,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.stage, self.cache, self.engine, self.device = config, stage, cache, engine, device
        self.ranks, self.alone = ranks or Ranks(), ranks is None
        self.dtype = next(stage.parameters()).dtype

    def run(self, parts: Sequence[Part]) -> list[Result]:
        """One forward pass. Keys and values of all parts are in the cache afterwards. Called on every rank alike."""
        # Without a grid nothing of megatron-core runs, so the torch-function mode that runtime.cpu_backend installs for
        # it on a CPU (Python code around every torch call) is switched off: measured, it takes a fifth of the CPU time
        # of a decoded token.
        plain = torch._C.DisableTorchFunction() if self.alone else nullcontext()
        with torch.inference_mode(), plain:
            return self._run(parts)

    def _run(self, parts: Sequence[Part]) -> list[Result]:
        computed = [part for part in parts if part.seer is None or is_full(part.evaluation)]
        rows = _Rows(computed, self.ranks)
        hidden = self._layers(computed, rows) if computed else None
        predictions = None
        if self.stage.last:
            predictions = self._predict(parts, rows, hidden)
        return self._shared(parts, computed, rows, predictions)

    def _layers(self, parts: Sequence[Part], rows: "_Rows") -> Hidden:
        """This stage's layers over the rows of `parts`; hidden states come from the stage before and go to the next."""
        pp, width = self.ranks.pp, self.config.hidden
        hidden = None
        if not self.stage.first:
            assert pp is not None
            got = torch.empty(len(rows.position_T), width, dtype=self.dtype, device=self.device)
            dist.recv(got, dist.get_global_rank(pp.group, pp.rank - 1), group=pp.group)
            und, gen = got.split([rows.und, rows.gen])
            hidden = Hidden(und, gen, gen[:, :0], gen[:, 0])
        hidden = self.stage.through_layers(self._inputs(parts, rows), hidden)
        if not self.stage.last:
            assert pp is not None
            sent = torch.cat([hidden.und_uD, hidden.gen_gD])
            dist.send(sent, dist.get_global_rank(pp.group, pp.rank + 1), group=pp.group)
        return hidden

    def _inputs(self, parts: Sequence[Part], rows: "_Rows") -> StageInputs:
        model, none = self.config, torch.zeros(0, dtype=torch.int64, device=self.device)
        tables = rope_tables(self._tensor(rows.position_T), model.kv_channels, model.rope_base, model.rope_precision)
        first = self.stage.first
        return StageInputs(
            attend=self._attention(parts, rows),
            rope=Rope(*tables),
            word_U=self._tensor(rows.ids_U),
            is_word_U=self._tensor(rows.is_text_U),
            vit=self._vit(parts, rows) if first else None,
            latents=self._latents(parts, rows) if first else None,
            ce_row_Q=none,
            label_Q=none,
            source_Q=none,
            source_g=none,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _vit(self, parts: Sequence[Part], rows: "_Rows") -> VitInputs | None:
        """ViT inputs: every context-parallel rank encodes the patches of all images, which is little work."""
        vit = self.config.vit
        images = [(grid, values) for part in parts for kind, grid, values, _ in images_of(part) if kind == VIT]
        if not images:
            return None
        sizes = [r * c for (r, c), _ in images]
        padding = max(0, MIN_ROWS - sum(sizes))
        grids = [grid_ids(r, c, vit.grid, self.config.interpolate_pos) for (r, c), _ in images]
        patches = torch.cat([*(values.to(self.device) for _, values in images)])
        grid = self._tensor(np.concatenate(grids))
        total = sum(sizes)
        return VitInputs(
            patches=torch.nn.functional.pad(patches, (0, 0, 0, padding)),
            grid=torch.nn.functional.pad(grid, (0, padding)),
            grid_all=grid,
            row_U=self._tensor(rows.vit_U),
            attend=self._within_images(sizes, padding),
            collect=lambda encoded: encoded[:total],
        )

    def _within_images(self, sizes: Sequence[int], padding: int) -> Attend:
        """Full attention inside each image, a plan for each."""
        head = self.config.vit.hidden // self.config.vit.heads
        one = {n: attend_across(self.engine.plan(mask_codes([[Segment(Mode.FULL, n)]]), head), self.engine)
               for n in set(sizes)}  # fmt: skip

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cut = [[*sizes, padding]] * 3
            of_image = zip(sizes, *(x.split(n) for x, n in zip((q, k, v), cut, strict=True)), strict=False)
            found = [one[size](*qkv) for size, *qkv in of_image]
            return torch.cat([*found, q.new_zeros(padding, *q.shape[1:])])

        return attend

    def _latents(self, parts: Sequence[Part], rows: "_Rows") -> LatentInputs:
        model = self.config
        images = [(grid, values, time) for part in parts
                  for kind, grid, values, time in images_of(part) if kind == LATENT]  # fmt: skip
        x = [torch.zeros(1, model.latent_dim), *(values.float() for _, values, _ in images)]
        x_t = torch.cat([values.to(self.device) for values in x])  # row 0: padding
        grids = [grid_ids(r, c, model.latent_grid, model.interpolate_pos) for (r, c), *_ in images]
        grid = np.concatenate([np.zeros(1, np.int64), *grids])
        numbers = [np.full(len(values), number) for number, (_, values, _) in enumerate(images)]
        image = np.concatenate([np.zeros(1, np.int64), *numbers])
        times = np.array([time for *_, time in images], np.float32)
        times = np.pad(times, (0, max(0, MIN_ROWS - len(times))))
        row = rows.latent_G + 1
        x_t_gZ, zero_g = x_t[self._tensor(row)], torch.zeros(len(row), device=self.device)
        return LatentInputs(
            x_t_gZ=x_t_gZ,
            target_gZ=x_t_gZ[:, :0],
            weight_g=zero_g,
            grid_g=self._tensor(grid[row]),
            time_I=self._tensor(times),
            image_g=self._tensor(image[row]),
        )

    def _attention(self, parts: Sequence[Part], rows: "_Rows") -> Callable[[int], Attend]:
        """Attention by layer: write new keys and values to the cache, then attend part by part over its cache rows."""
        calls = [self._plan(part.layout, self._tensor(row_T)) for part, row_T in zip(parts, rows.of_part, strict=True)]
        slots_W = self._tensor(np.where(rows.slot_W < 0, self.cache.trash, rows.slot_W))
        cp = self.ranks.cp

        def attend_at(layer: int) -> Attend:
            def attend(q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> Tensor:
                if cp is not None and cp.size > 1:
                    k_TMH, v_TMH = join_over_cp(torch.cat([k_TMH, v_TMH], 1), cp).chunk(2, 1)
                self.cache.write(layer, slots_W, k_TMH, v_TMH)
                keys, values, out = self.cache.keys[layer], self.cache.values[layer], torch.zeros_like(q_TNH)
                for row, key, plan in calls:
                    found = self.engine.run(q_TNH.index_select(0, row), _pick(keys, key), _pick(values, key), plan)
                    out.index_copy_(0, row, found)
                return out

            return attend

        return attend_at

    def _plan(self, layout: Layout, row_T: Tensor) -> tuple[Tensor, Tensor | slice, Any]:
        """(rows of this rank, cache rows of the keys, plan) of a part; the latter two are made once per layout."""
        at = (self.ranks.cp_rank, self.ranks.cp_size)
        if at not in layout.plans:
            keys, codes = layout.mask
            token = np.concatenate([layout.share(generation, *at) for generation in (False, True)])
            plan = self.engine.plan(codes.take(queries=token[token >= 0]), self.config.kv_channels)
            straight = len(keys) > 0 and np.array_equal(keys, keys[0] + np.arange(len(keys)))
            where = slice(int(keys[0]), int(keys[-1]) + 1) if straight else self._tensor(keys)
            layout.plans[at] = where, self.engine.place(plan)
        return row_T, *layout.plans[at]

    def _predict(self, parts: Sequence[Part], rows: "_Rows", hidden: Hidden | None) -> Predictions:
        """Heads over computed rows and, behind them, over extrapolated features."""
        width, model = self.config.hidden, self.config
        empty = torch.zeros(0, width, dtype=self.dtype, device=self.device)
        und, gen = (empty, empty) if hidden is None else (hidden.und_uD, hidden.gen_gD)
        features = []
        at = 0
        for part in parts:
            count = int((part.layout.kind == LATENT).sum())
            share = -(-count // self.ranks.cp_size)
            if part.seer is None:
                at += share
            elif is_full(part.evaluation):
                part.seer.update(part.evaluation, gen[at : at + share])
                at += share
            else:
                features.append(part.seer.extrapolate(part.evaluation))
        row_Q = self._tensor(rows.logits_Q)
        gen = torch.cat([gen[: rows.real_gen], *features])
        gen = torch.nn.functional.pad(gen, (0, 0, 0, max(0, MIN_ROWS - len(gen)) if len(gen) else 0))
        if len(row_Q) == 0:
            return Predictions(torch.zeros(0, model.vocab, device=self.device), self.stage.heads.velocity(gen).float())
        found = self.stage.heads.predict(und, gen, torch.nn.functional.pad(row_Q, (0, max(0, MIN_ROWS - len(row_Q)))))
        return Predictions(found.logits_QV[: len(row_Q)], found.velocity_gZ.float())

    def _shared(
        self, parts: Sequence[Part], computed: Sequence[Part], rows: "_Rows", found: Predictions | None
    ) -> list[Result]:
        """Results of every part on every rank: rows are gathered over cp, then broadcast from the last stage."""
        size, Z, V = self.ranks.cp_size, self.config.latent_dim, self.config.vocab
        counts = [int((part.layout.kind == LATENT).sum()) for part in parts]
        order = [i for i, part in enumerate(parts) if part in computed] + [
            i for i, part in enumerate(parts) if part not in computed
        ]
        wanted = [len(part.layout.wanted) for part in computed]
        logits = torch.zeros(sum(wanted), V, device=self.device)
        velocity = torch.zeros(sum(counts), Z, device=self.device)
        if found is not None:
            logits[self._tensor(rows.logits_at)] = found.logits_QV
            shares = [-(-counts[i] // size) for i in order]
            mine = found.velocity_gZ[: sum(shares)]
            if size > 1:
                assert self.ranks.cp is not None
                dist.all_reduce(logits, group=self.ranks.cp.group)
                mine = join_over_cp(mine, self.ranks.cp)
            by_rank = [whole.split(shares) for whole in mine.chunk(size)] if sum(shares) else []
            pieces = [torch.cat([part[n] for part in by_rank])[: counts[i]] for n, i in enumerate(order) if by_rank]
            velocity = torch.cat([velocity[:0], *pieces])
        if self.ranks.pp is not None and self.ranks.pp.size > 1:
            pp = self.ranks.pp
            for shared in (logits, velocity):
                if shared.numel():
                    dist.broadcast(shared, dist.get_global_rank(pp.group, pp.size - 1), group=pp.group)
        of_part = dict(zip(order, velocity.split([counts[i] for i in order]), strict=True))
        of_logits = iter(logits.split(wanted))
        return [
            Result(
                next(of_logits) if part in computed else logits[:0],
                of_part[i].split([r * c for kind, (r, c), *_ in images_of(part) if kind == LATENT]),
            )
            for i, part in enumerate(parts)
        ]


def _pick(rows: Tensor, which: Tensor | slice) -> Tensor:
    """Rows of the cache: a view where they are contiguous, which saves the copy, else a gather."""
    return rows[which] if isinstance(which, slice) else rows.index_select(0, which)


def images_of(part: Part) -> list[tuple[int, tuple[int, int], Tensor, float]]:
    """(kind, grid, values, timestep) of every image of a part."""
    segments = [segment for segment in part.layout.segments if segment.grid is not None]
    found = zip(segments, part.images, part.times, strict=True)
    return [(int(segment.kind[1]), segment.grid, values, time) for segment, values, time in found if segment.grid]


class _Rows:
    """Placement of the tokens of all parts on this rank, as [und | gen] rows, in NumPy."""

    def __init__(self, parts: Sequence[Part], ranks: Ranks) -> None:
        rank, size = ranks.cp_rank, ranks.cp_size
        layouts = [part.layout for part in parts]
        own = [tuple(layout.share(gen, rank, size) for gen in (False, True)) for layout in layouts]
        und, gen = sum(len(u) for u, _ in own), sum(len(g) for _, g in own)
        self.real_gen = gen
        self.und, self.gen = (max(rows, MIN_ROWS) if rows else 0 for rows in (und, gen))
        starts = np.cumsum([0, *(layout.tokens for layout in layouts)])
        self._fill = {
            name: np.concatenate([np.zeros(0, np.int64), *(layout.joined(name) for layout in layouts)])
            for name in ("kind", "ids", "position", "slots")
        }
        token_U, token_G = (
            self._padded([np.where(o[e] >= 0, o[e] + s, -1) for o, s in zip(own, starts, strict=False)], rows)
            for e, rows in ((0, self.und), (1, self.gen))
        )
        token_T = np.concatenate([token_U, token_G])
        kind, real = self._fill["kind"], token_T >= 0
        self.position_T = np.where(real, self._fill["position"][token_T], 0) if len(kind) else token_T
        self.is_text_U = (token_U >= 0) & (kind[token_U] == TEXT) if len(kind) else token_U >= 0
        self.ids_U = np.where(self.is_text_U, self._fill["ids"][token_U], 0) if len(kind) else token_U
        self.vit_U, self.latent_G = (self._order(token, k) for token, k in ((token_U, VIT), (token_G, LATENT)))
        self.slot_W = np.concatenate([self._slots(layouts, r, size) for r in range(size)])
        self.of_part = self._rows_of_parts(own)
        row_of = {int(token): row for row, token in enumerate(token_U) if token >= 0}
        wanted = [int(s + w) for layout, s in zip(layouts, starts, strict=False) for w in layout.wanted]
        self.logits_Q = np.array([row_of[token] for token in wanted if token in row_of], np.int64)
        self.logits_at = np.array([i for i, token in enumerate(wanted) if token in row_of], np.int64)

    @staticmethod
    def _padded(tokens: list[np.ndarray], rows: int) -> np.ndarray:
        found = np.concatenate([np.zeros(0, np.int64), *tokens])
        return np.concatenate([found, np.full(rows - len(found), -1, np.int64)])

    def _order(self, token: np.ndarray, kind: int) -> np.ndarray:
        """Number of each row's token among all of its kind; -1 for others."""
        if len(token) == 0:
            return token
        number = np.cumsum(self._fill["kind"] == kind) - 1
        return np.where((token >= 0) & (self._fill["kind"][token] == kind), number[token], -1)

    def _slots(self, layouts: Sequence[Layout], rank: int, size: int) -> np.ndarray:
        """Cache row of every row of a rank; -1 for padding."""
        found = []
        for generation, rows in ((False, self.und), (True, self.gen)):
            slots = [np.zeros(0, np.int64)]
            for layout in layouts:
                token = layout.share(generation, rank, size)
                slots.append(np.where(token >= 0, layout.joined("slots")[token], -1))
            found.append(self._padded(slots, rows))
        return np.concatenate(found)

    def _rows_of_parts(self, own: Sequence[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
        """Rows of this rank that hold the tokens of each part, und before gen."""
        found, at_und, at_gen = [], 0, self.und
        for und, gen in own:
            rows = np.concatenate([at_und + np.flatnonzero(und >= 0), at_gen + np.flatnonzero(gen >= 0)])
            found.append(rows.astype(np.int64))
            at_und, at_gen = at_und + len(und), at_gen + len(gen)
        return found
