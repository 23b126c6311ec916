"""Consistency check: do all ranks of a model-parallel group derive the same shapes from the same plan?

As in a run, every rank derives its pack, the layout and the shapes that it exchanges from the config and its place
alone, without communication. The results are then compared. Packs are typical ones (`workload`), assigned to
data-parallel ranks as in a run.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megabagel.config.schema import Config
from megabagel.model.inputs import Hidden
from megabagel.parallel.megatron import parameter_dtype
from megabagel.parallel.stage_activations import to_wire
from megabagel.planner.workload import Workload
from megabagel.sequence.flops import relative_time
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import turns
from megabagel.sequence.rank_rows import RankPack, RankPlace
from megabagel.sequence.sizes import pack_size


@dataclass(frozen=True)
class Place:
    """A rank's index on every axis. Ranks are numbered tp fastest, then cp, dp, pp, as in megatron-core."""

    tp: int
    cp: int
    dp: int
    pp: int

    @classmethod
    def of(cls, rank: int, config: Config, dp_size: int) -> "Place":
        """The place of a rank."""
        p = config.parallel
        rest, tp = divmod(rank, p.tp)
        rest, cp = divmod(rest, p.cp)
        pp, dp = divmod(rest, dp_size)
        return cls(tp, cp, dp, pp)

    def rank(self, config: Config, dp_size: int) -> int:
        """Global rank at this place; inverse of `of`."""
        return ((self.pp * dp_size + self.dp) * config.parallel.cp + self.cp) * config.parallel.tp + self.tp


@dataclass(frozen=True)
class Derived:
    """Shapes and assignments that one rank derives for its first micro-batch."""

    place: Place
    pack: str
    """Digest of the pack: lengths, kinds, positions and mask integers."""
    layout: str
    """Digest of the whole layout."""
    rows: int
    border: int
    tokens: tuple[int, ...]
    """Sequence numbers of the tokens on its rows."""
    pack_tokens: int
    sends: tuple[int, ...]
    """Shape of the tensor that it sends to the next stage."""
    vit: tuple[int, ...]
    """Images that it encodes."""
    vae: tuple[int, ...]
    images: tuple[int, int]
    """ViT and VAE images of the pack."""


def derive(config: Config, workload: Workload, place: Place, dp_size: int) -> Derived:
    """Derive the first micro-batch as the rank at `place` would.

    Args:
        config: config of the run.
        workload: typical packs.
        place: indices of the rank on all axes.
        dp_size: data-parallel ranks of the job.
    """
    last = place.pp == config.parallel.pp - 1
    pack = _first_pack(config, workload, place.dp, dp_size)
    rank = RankPack.of(pack, config, RankPlace(place.tp, place.cp, first=place.pp == 0, last=last))
    layout, mine = rank.layout, rank.layout.rank(place.cp)
    return Derived(
        place=place,
        pack=_digest(pack.kind_S, pack.position_S, pack.sample_S, *vars(pack.codes).values()),
        layout=_digest(layout.token_K, np.array(layout.num_und)),
        rows=len(mine),
        border=layout.num_und[place.cp],
        tokens=tuple(mine[mine >= 0].tolist()),
        pack_tokens=pack.tokens,
        sends=_sent(config, layout.num_und[place.cp], len(mine)),
        vit=rank.vit.dealt[place.cp] if place.pp == 0 else (),
        vae=rank.vae.dealt[rank.vae_rank] if place.pp == 0 else (),
        images=(len(rank.vit.sizes), len(rank.vae.sizes)),
    )


def _first_pack(config: Config, workload: Workload, dp_rank: int, dp_size: int) -> Pack:
    """The pack that a data-parallel rank runs first; the typical packs stand in for those of the step, in turn."""
    step = [workload.packs[i % len(workload.packs)] for i in range(config.train.packs_per_step)]
    costs = {id(pack): relative_time(pack_size(pack), config.model) for pack in workload.packs}
    return step[turns([costs[id(pack)] for pack in step], dp_size)[0][dp_rank]]


def _sent(config: Config, und: int, rows: int) -> tuple[int, ...]:
    """Shape of the stage activations of this rank's rows (`parallel.stage_activations.to_wire`), on the meta device."""
    split = config.parallel.row_shards
    width, gen, dtype = config.model.hidden, (rows - und) // split, parameter_dtype(config)
    with torch.device("meta"):
        target = torch.empty(gen, config.model.latent_dim)
        und_uD, gen_gD = torch.empty(und // split, width, dtype=dtype), torch.empty(gen, width, dtype=dtype)
        return tuple(to_wire(Hidden(und_uD, gen_gD, target, target[:, 0]), config.two_targets).shape)


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def disagreements(group: Sequence[Derived], config: Config, wire_shape: tuple[int, ...]) -> Iterator[str]:
    """Yield one line per inconsistency in a model-parallel group (ranks with one data-parallel index).

    wire_shape: what the schedules expect to receive.
    """
    first = group[0]
    for derived in group:
        for name in ("pack", "layout", "rows", "pack_tokens"):
            if getattr(derived, name) != getattr(first, name):
                yield f"{derived.place}: {name} = {getattr(derived, name)}, {first.place} has {getattr(first, name)}"
        chunk = config.parallel.chunk
        if derived.border % chunk or not chunk <= derived.border <= derived.rows - chunk:
            yield f"{derived.place}: {derived.border} und rows of {derived.rows}: expected chunks of {chunk} of both"
        if config.parallel.pp > 1 and derived.sends != wire_shape:
            yield f"{derived.place}: sends {derived.sends}, the next stage expects {wire_shape}"
    yield from _rows_disagree(group, config)
    yield from _images_disagree(group)


def _rows_disagree(group: Sequence[Derived], config: Config) -> Iterator[str]:
    """Tensor- and pipeline-parallel ranks hold the same rows; context-parallel ranks share all tokens out."""
    by_cp: dict[int, Derived] = {}
    for derived in group:
        known = by_cp.setdefault(derived.place.cp, derived)
        if (derived.tokens, derived.border) != (known.tokens, known.border):
            yield f"{derived.place}: other rows than {known.place} (und rows {derived.border} and {known.border})"
    held = sorted(token for derived in by_cp.values() for token in derived.tokens)
    if len(by_cp) == config.parallel.cp and held != list(range(group[0].pack_tokens)):
        yield (
            f"context-parallel ranks hold {len(held)} rows with tokens, {len(set(held))} of them different: expected "
            f"each of {group[0].pack_tokens} tokens once"
        )


def _images_disagree(group: Sequence[Derived]) -> Iterator[str]:
    """On the first stage every VAE image is encoded by one rank, every ViT image by one context-parallel rank."""
    stage = [derived for derived in group if derived.place.pp == 0]
    encoded = sorted(image for derived in stage for image in derived.vae)
    if encoded != list(range(group[0].images[1])):
        yield f"the first stage encodes VAE images {encoded}, expected each of {group[0].images[1]} once"
    seen = sorted(image for derived in stage if derived.place.tp == 0 for image in derived.vit)
    if seen != list(range(group[0].images[0])):
        yield f"the first stage encodes ViT images {seen}, expected each of {group[0].images[0]} once"
