"""A pack: several samples laid end to end (S tokens), with RoPE ids, attention ranges and loss rows per token.

The mask is five integers per token: one code per key, and per query two half-open ranges of codes; a query sees the
keys whose code lies in either range. The code of a public key is its sequence position. Private keys (noised images,
visible to their own segment and to later groups of their chain) have the code PRIVATE + a number of their segment. The
rule is written out in `megabagel_kernels.attention.mask`.
"""

from dataclasses import dataclass

import numpy as np
from megabagel_kernels.attention.mask import PRIVATE, AttentionRanges, visible_per_query

from megabagel.sequence.items import Mode
from megabagel.sequence.sample import LATENT, TEXT, LatentImage, SamplePlan, Segment


@dataclass(frozen=True)
class Pack:
    """The token sequence of one micro-batch."""

    samples: tuple[SamplePlan, ...]
    """The samples in order; `kind_S`, `position_S` and `ce_S` are theirs, concatenated."""
    kind_S: np.ndarray
    """uint8: TEXT, VIT or LATENT."""
    position_S: np.ndarray
    """int32 RoPE ids."""
    ce_S: np.ndarray
    """bool: rows with cross-entropy, whose next token is a target."""
    sample_S: np.ndarray
    """int32 index of the token's sample."""
    codes: AttentionRanges
    """The mask, queries and keys in sequence order."""
    fill_S: np.ndarray
    """int64 index of the token among the pack's tokens of its kind: text ids, ViT patches or latent tokens."""
    noised_S: np.ndarray
    """bool: latent rows with flow loss."""

    @property
    def tokens(self) -> int:
        """S, the number of tokens."""
        return len(self.kind_S)

    @property
    def tokens_gen(self) -> int:
        """Number of tokens of the generation expert."""
        return int((self.kind_S == LATENT).sum())

    @property
    def ce_tokens(self) -> int:
        """Number of rows with cross-entropy."""
        return int(self.ce_S.sum())

    @property
    def mse_tokens(self) -> int:
        """Number of rows with flow loss."""
        return int(self.noised_S.sum())

    @property
    def latents(self) -> list[LatentImage]:
        """Latent images in token order."""
        return [image for sample in self.samples for image in sample.latents]

    @property
    def visible_S(self) -> np.ndarray:
        """int64 [S]: number of keys that each query sees, the attention work of its row."""
        return visible_per_query(self.codes)


def build_pack(samples: list[SamplePlan]) -> Pack:
    """Concatenate samples to a pack. Each sample must have at least one token."""
    lengths = [sample.tokens for sample in samples]
    kind_S = np.concatenate([sample.kind_S for sample in samples])
    fill_S = np.zeros(len(kind_S), np.int64)
    for kind in range(TEXT, LATENT + 1):
        rows = kind_S == kind
        fill_S[rows] = np.arange(rows.sum())
    noised_S = np.zeros(len(kind_S), bool)
    images = [image for sample in samples for image in sample.latents]
    noised_S[kind_S == LATENT] = np.repeat(
        np.array([image.noised for image in images], bool), [image.rows * image.cols for image in images]
    )
    return Pack(
        samples=tuple(samples),
        kind_S=kind_S,
        position_S=np.concatenate([sample.position_S for sample in samples]),
        ce_S=np.concatenate([sample.ce_S for sample in samples]),
        sample_S=np.repeat(np.arange(len(samples), dtype=np.int32), lengths),
        codes=mask_codes([sample.segments for sample in samples]),
        fill_S=fill_S,
        noised_S=noised_S,
    )


def mask_codes(samples: list[list[Segment]]) -> AttentionRanges:
    """Return the attention ranges of a pack, in sequence order, from the segments of each sample (docs/bagel.md#mask).

    Args:
        samples: per sample its segments in order.
    """
    total = sum(segment.length for segments in samples for segment in segments)
    code, public_start, public_stop, private_start, private_stop = (np.zeros(total, np.int32) for _ in range(5))
    start, group = 0, 0
    for segments in samples:
        sample_start = start
        groups, first_of_chain, group = _number_groups(segments, group)
        for index, segment in enumerate(segments):
            rows = slice(start, start + segment.length)
            public_start[rows] = sample_start
            if segment.mode is Mode.NOISE:
                own = PRIVATE + groups[index]
                code[rows], public_stop[rows] = own, start
                private_start[rows], private_stop[rows] = PRIVATE + first_of_chain[index], own + 1
            else:
                sequence = np.arange(rows.start, rows.stop, dtype=np.int32)
                code[rows] = sequence
                public_stop[rows] = sequence + 1 if segment.mode is Mode.CAUSAL else rows.stop
            start = rows.stop
    return AttentionRanges(code, public_start, public_stop, private_start, private_stop)


def _number_groups(segments: list[Segment], group: int) -> tuple[dict[int, int], dict[int, int], int]:
    """Number the noise segments of a sample, starting at `group`.

    Returns:
        (number by segment index, first number of its chain by segment index, next free number).
    """
    # Segments of one chain get consecutive numbers even if others stand between them in the sequence: a later group
    # then sees all earlier ones through a single range of private codes.
    members: dict[object, list[int]] = {}
    for index, segment in enumerate(segments):
        if segment.mode is Mode.NOISE:
            members.setdefault(("alone", index) if segment.chain is None else segment.chain, []).append(index)
    number, first = {}, {}
    for indices in members.values():
        for offset, index in enumerate(indices):
            number[index], first[index] = group + offset, group
        group += len(indices)
    return number, first, group
