"""A pack: several samples laid end to end, with everything attention and the losses need to know (S tokens).

The mask is five integers per token: a code per key, and per query two ranges of codes that it sees. Public keys carry
their sequence position as code, private ones (noised images, seen by their own segment and by later groups of their
chain) PRIVATE + a number of their own. The rule is written out in `megabagel_kernels.attention.mask`.
"""

from dataclasses import dataclass

import numpy as np
from megabagel_kernels.attention.mask import PRIVATE, AttentionRanges, visible_per_query

from megabagel.sequence.items import Mode
from megabagel.sequence.sample import LATENT, TEXT, LatentImage, SamplePlan, Segment


@dataclass(frozen=True)
class Pack:
    """One micro-batch in sequence order.

    samples: the plans, in order. kind_S, position_S, ce_S: theirs, concatenated. sample_S (int32): which sample.
    codes: the mask integers, queries and keys in sequence order.
    fill_S (int64): which row of its content stream a token takes: text ids, ViT patches or latent tokens, by kind.
    noised_S (bool): latent rows that bear flow loss.
    """

    samples: tuple[SamplePlan, ...]
    kind_S: np.ndarray
    position_S: np.ndarray
    ce_S: np.ndarray
    sample_S: np.ndarray
    codes: AttentionRanges
    fill_S: np.ndarray
    noised_S: np.ndarray

    @property
    def tokens(self) -> int:
        """S."""
        return len(self.kind_S)

    @property
    def tokens_gen(self) -> int:
        """Tokens of the generation expert."""
        return int((self.kind_S == LATENT).sum())

    @property
    def ce_tokens(self) -> int:
        """Rows with cross-entropy."""
        return int(self.ce_S.sum())

    @property
    def mse_tokens(self) -> int:
        """Rows with flow loss."""
        return int(self.noised_S.sum())

    @property
    def latents(self) -> list[LatentImage]:
        """Latent images in token order."""
        return [image for sample in self.samples for image in sample.latents]

    @property
    def visible_S(self) -> np.ndarray:
        """Keys that each query sees (int64): the attention work of the row."""
        return visible_per_query(self.codes)


def build_pack(samples: list[SamplePlan]) -> Pack:
    """Lay samples end to end. Each sample must have at least one token."""
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
    """Mask integers of a pack from its samples' segments, in sequence order (BAGEL section 2.3).

    The noise segments of one chain are numbered consecutively, so that a later group sees one range of private codes.
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
    """Give every noise segment a private number; members of a chain follow one another.

    Returns (number by segment index, first number of its chain by segment index, next free number).
    """
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
