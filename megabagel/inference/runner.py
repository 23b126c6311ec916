"""Forward pass over the parts of any requests on this rank; the only file of inference that calls the model.

Rows of all parts are ordered [und | gen] and split over context-parallel ranks part by part. Every rank keeps the whole
KV cache of its layers and heads, so new keys and values are gathered while queries stay. Pipeline stages exchange
hidden states of the pass. Predictions of the last stage are broadcast, so that every rank takes the same decisions.

Results are bitwise independent of the other parts in a pass: each part has an attention plan of its own, and everything
else works row by row. An fp32 GEMM of MKL uses another kernel for 1 to 3 rows, with different last bits, so such blocks
are padded to 4 rows, except on packed linears (`packed.py`).

Legend: see `model.inputs`; T = U + G rows of this rank, W rows of all context-parallel ranks, Q rows with logits.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.config.schema import ModelConfig
from megabagel.inference.cache import KVCache
from megabagel.inference.placement import Placement, Shape, place, share_of
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
from megabagel.sequence.sample import LATENT, VIT, Segment


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
        least_rows: int = 4,
    ) -> None:
        self.config, self.stage, self.cache, self.engine, self.device = config, stage, cache, engine, device
        self.ranks, self.alone = ranks or Ranks(), ranks is None
        self.dtype = next(stage.parameters()).dtype
        self.placement: Placement | None = None  # of the rows in the layers, for hooks on modules
        nothing, zero = torch.zeros(0, config.latent_dim, device=device), torch.zeros(0, device=device)
        self._no_ids = torch.zeros(0, dtype=torch.int64, device=device)
        self._no_latents = LatentInputs(
            nothing, nothing, zero, self._no_ids, torch.zeros(least_rows, device=device), self._no_ids
        )
        self.least_rows, at = least_rows, (self.ranks.cp_rank, self.ranks.cp_size)
        self._rows = lru_cache(maxsize=64)(lambda shapes: _Rows(shapes, *at, least_rows, device))

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
        extrapolated = [part for part in parts if part.seer is not None and not is_full(part.evaluation)]
        rows = self._rows(tuple(part.layout.shape for part in computed))
        self.placement = rows.at
        hidden = self._layers(computed, rows) if computed else None
        predictions = self._predict(computed, extrapolated, rows, hidden) if self.stage.last else None
        logits, velocity = self._shared(computed, extrapolated, rows, predictions)
        order = [*computed, *extrapolated]
        of_velocity = dict(zip(order, velocity.split([part.layout.latents for part in order]), strict=True))
        of_logits = dict(zip(computed, logits.split([len(part.layout.wanted) for part in computed]), strict=True))
        return [
            Result(of_logits.get(part, logits[:0]), of_velocity[part].split(part.layout.pictures)) for part in parts
        ]

    def _layers(self, parts: Sequence[Part], rows: "_Rows") -> Hidden:
        """This stage's layers over the rows of `parts`; hidden states come from the stage before and go to the next."""
        pp, width = self.ranks.pp, self.config.hidden
        hidden = None
        if not self.stage.first:
            assert pp is not None
            got = torch.empty(len(rows.at.token_T), width, dtype=self.dtype, device=self.device)
            dist.recv(got, dist.get_global_rank(pp.group, pp.rank - 1), group=pp.group)
            und, gen = got.split([rows.at.und, rows.at.gen])
            hidden = Hidden(und, gen, gen[:, :0], gen[:, 0])
        hidden = self.stage.through_layers(self._inputs(parts, rows), hidden)
        if not self.stage.last:
            assert pp is not None
            sent = torch.cat([hidden.und_uD, hidden.gen_gD])
            dist.send(sent, dist.get_global_rank(pp.group, pp.rank + 1), group=pp.group)
        return hidden

    def _inputs(self, parts: Sequence[Part], rows: "_Rows") -> StageInputs:
        model, none = self.config, self._no_ids
        position_T = self._tensor(_joined(parts, "position", 0)[rows.at.token_T])
        tables = rope_tables(position_T, model.kv_channels, model.rope_base, model.rope_precision)
        first = self.stage.first
        return StageInputs(
            attend=self._attention(parts, rows),
            rope=Rope(*tables),
            word_U=self._tensor(_joined(parts, "ids", 0)[rows.at.token_T[: rows.at.und]]),
            is_word_U=rows.is_text_U,
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
        padding = max(0, self.least_rows - sum(sizes))
        grids = [grid_ids(r, c, vit.grid, self.config.interpolate_pos) for (r, c), _ in images]
        patches = torch.cat([*(values.to(self.device) for _, values in images)])
        grid = self._tensor(np.concatenate(grids))
        total = sum(sizes)
        return VitInputs(
            patches=torch.nn.functional.pad(patches, (0, 0, 0, padding)),
            grid=torch.nn.functional.pad(grid, (0, padding)),
            grid_all=grid,
            row_U=rows.vit_U,
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
        if rows.at.gen == 0:
            return self._no_latents
        images = [(grid, values, time) for part in parts
                  for kind, grid, values, time in images_of(part) if kind == LATENT]  # fmt: skip
        x = [torch.zeros(1, model.latent_dim), *(values.float() for _, values, _ in images)]
        x_t = torch.cat([values.to(self.device) for values in x])  # row 0: padding
        grids = [grid_ids(r, c, model.latent_grid, model.interpolate_pos) for (r, c), *_ in images]
        grid = np.concatenate([np.zeros(1, np.int64), *grids])
        numbers = [np.full(len(values), number) for number, (_, values, _) in enumerate(images)]
        image = np.concatenate([np.zeros(1, np.int64), *numbers])
        times = np.array([time for *_, time in images], np.float32)
        times = np.pad(times, (0, max(0, self.least_rows - len(times))))
        row = rows.at.latent_G + 1
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
        calls = [(row, *self._plan(part.layout)) for part, row in zip(parts, rows.of_part, strict=True)]
        slots_W = self._tensor(_joined(parts, "slots", self.cache.trash)[rows.at.token_W])
        cp = self.ranks.cp

        def attend_at(layer: int) -> Attend:
            keys, values = self.cache.keys[layer], self.cache.values[layer]

            def attend(q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> Tensor:
                if cp is not None and cp.size > 1:
                    k_TMH, v_TMH = join_over_cp(torch.cat([k_TMH, v_TMH], 1), cp).chunk(2, 1)
                self.cache.write(layer, slots_W, k_TMH, v_TMH)
                if rows.one_part:
                    ((_, key, plan),) = calls
                    return self.engine.run(q_TNH, _pick(keys, key), _pick(values, key), plan)
                out = torch.zeros_like(q_TNH)
                for row, key, plan in calls:
                    out[row] = self.engine.run(_pick(q_TNH, row), _pick(keys, key), _pick(values, key), plan)
                return out

            return attend

        return attend_at

    def _plan(self, layout: Layout) -> tuple[Tensor | slice, Any]:
        """(cache rows of the keys, plan) of a part; made once per layout."""
        at = (self.ranks.cp_rank, self.ranks.cp_size)
        if at not in layout.plans:
            keys, codes = layout.mask
            token = np.concatenate([share_of(layout.kind, generation, *at) for generation in (False, True)])
            plan = self.engine.plan(codes.take(queries=token[token >= 0]), self.config.kv_channels)
            layout.plans[at] = _index(keys, self.device), self.engine.place(plan)
        return layout.plans[at]

    def _predict(
        self, computed: Sequence[Part], extrapolated: Sequence[Part], rows: "_Rows", hidden: Hidden | None
    ) -> Predictions:
        """Heads over computed rows and, behind them, over extrapolated features."""
        heads, none = self.stage.heads, torch.zeros(0, self.config.hidden, dtype=self.dtype, device=self.device)
        gen, at = none if hidden is None else hidden.gen_gD[: rows.at.real_gen], 0
        for part in computed:
            share = self._share(part.layout)
            if part.seer is not None:
                part.seer.update(part.evaluation, gen[at : at + share])
            at += share
        if extrapolated:
            gen = torch.cat([gen, *(part.seer.extrapolate(part.evaluation) for part in extrapolated if part.seer)])
        if 0 < len(gen) < self.least_rows:
            gen = torch.nn.functional.pad(gen, (0, 0, 0, self.least_rows - len(gen)))
        logits_QV = torch.zeros(0, self.config.vocab, device=self.device)
        if hidden is not None and len(rows.logits_Q):
            logits_QV = heads.logits(hidden.und_uD, rows.padded_logits_Q)[: len(rows.logits_Q)]
        velocity_gZ = heads.velocity(gen).float() if len(gen) else gen.new_zeros(0, self.config.latent_dim)
        return Predictions(logits_QV, velocity_gZ)

    def _share(self, layout: Layout) -> int:
        """Gen rows that every context-parallel rank computes of a part."""
        return -(-layout.latents // self.ranks.cp_size)

    def _shared(
        self, computed: Sequence[Part], extrapolated: Sequence[Part], rows: "_Rows", found: Predictions | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and velocities of all ranks on every rank: gathered over cp, then broadcast from the last stage."""
        order, cp, pp = [*computed, *extrapolated], self.ranks.cp, self.ranks.pp
        total = sum(part.layout.latents for part in order)
        if found is not None and (cp is None or cp.size == 1):
            logits, velocity = found.logits_QV, found.velocity_gZ[:total]
        else:
            wanted = sum(len(part.layout.wanted) for part in computed)
            logits = torch.zeros(wanted, self.config.vocab, device=self.device)
            velocity = torch.zeros(total, self.config.latent_dim, device=self.device)
        if found is not None and cp is not None and cp.size > 1:
            logits[rows.logits_at] = found.logits_QV
            dist.all_reduce(logits, group=cp.group)
            shares = [self._share(part.layout) for part in order]
            if total:
                of_ranks = join_over_cp(found.velocity_gZ[: sum(shares)].contiguous(), cp).chunk(cp.size)
                by_rank = [whole.split(shares) for whole in of_ranks]
                pieces = [torch.cat([r[n] for r in by_rank])[: part.layout.latents] for n, part in enumerate(order)]
                velocity = torch.cat(pieces)
        if pp is not None and pp.size > 1:
            for shared in (logits, velocity):
                if shared.numel():
                    dist.broadcast(shared, dist.get_global_rank(pp.group, pp.size - 1), group=pp.group)
        return logits, velocity


def _pick(rows: Tensor, which: Tensor | slice) -> Tensor:
    return rows[which] if isinstance(which, slice) else rows.index_select(0, which)


def _joined(parts: Sequence[Part], name: str, padding: int) -> np.ndarray:
    """A per-token array of all parts, end to end, and the value of padding, which index -1 reads."""
    arrays = [getattr(segment, name) for part in parts for segment in part.layout.segments]
    return np.concatenate([*arrays, np.full(1, padding, np.int64)])


def images_of(part: Part) -> list[tuple[int, tuple[int, int], Tensor, float]]:
    """(kind, grid, values, timestep) of every image of a part."""
    segments = [segment for segment in part.layout.segments if segment.grid is not None]
    found = zip(segments, part.images, part.times, strict=True)
    return [(int(segment.kind[1]), segment.grid, values, time) for segment, values, time in found if segment.grid]


class _Rows:
    """A placement of parts with its tensors on the device; shared by all passes whose parts have the same shapes."""

    def __init__(self, shapes: tuple[Shape, ...], rank: int, size: int, least: int, device: torch.device) -> None:
        self.at = place(shapes, rank, size, least)
        self.is_text_U, self.vit_U, self.logits_Q, self.logits_at = (
            torch.from_numpy(array).to(device)
            for array in (self.at.is_text_U, self.at.vit_U, self.at.logits_Q, self.at.logits_at)
        )
        self.one_part = len(shapes) == 1 and len(self.at.of_part[0]) == len(self.at.token_T)  # and no padding
        self.of_part = tuple(_index(rows, device) for rows in self.at.of_part)
        short = max(0, least - len(self.logits_Q))
        self.padded_logits_Q = torch.nn.functional.pad(self.logits_Q, (0, short))


def _index(rows: np.ndarray, device: torch.device) -> Tensor | slice:
    """Rows as an index: a slice where they are contiguous, so that reading them is a view instead of a copy."""
    if len(rows) and np.array_equal(rows, rows[0] + np.arange(len(rows))):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows).to(device)
