"""From a planned pack to a packed batch: lays it out, writes its words, reads and decodes its images.

Nothing here decides an order: the plan does. An image that fails although the index found it sound is replaced:
latents by NaN, which the model side turns into rows without loss, ViT patches by grey.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megabagel.config.schema import Config
from megabagel.data.decode import DecodeEngine, Request, Views
from megabagel.data.documents import Document, ImageItem, SampleError, TextItem
from megabagel.data.index.index import Index
from megabagel.data.load.latents import LatentCache
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.plan.planned_sample import Rules, Task
from megabagel.data.tokenize.token_ids import Writer
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.images import VaeImage
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.patches import patchify
from megabagel.sequence.sample import SamplePlan


@dataclass(frozen=True)
class LostImage:
    """An image that could not be decoded: whose visit, which slot, and why."""

    key: SampleKey
    slot: int
    message: str


@dataclass(frozen=True)
class Filled:
    """A packed batch and the images that it lacks."""

    batch: PackedBatch
    lost: tuple[LostImage, ...]


@dataclass(frozen=True)
class Filler:
    """Fills packs for one rank. Plain data: a worker process holds a copy.

    indexes: by source, for their readers; documents come with the packs. batches: what makes a rank's batch of them.
    """

    rules: Rules
    indexes: Mapping[str, Index]
    tokenizer: TextTokenizer
    decode: DecodeEngine
    config: Config
    batches: BatchBuilder
    latents: LatentCache | None

    @classmethod
    def of(
        cls,
        plan: GlobalPlan,
        tokenizer: TextTokenizer,
        decode: DecodeEngine,
        batches: BatchBuilder,
        latents: LatentCache | None,
    ) -> "Filler":
        """The filler of a plan's packs."""
        indexes = {name: replace(source.index, documents=(), skipped=()) for name, source in plan.sources.items()}
        return cls(plan.rules, indexes, tokenizer, decode, plan.config, batches, latents)

    @property
    def most_bytes(self) -> int:
        """Upper bound of the pixels and patches of one pack: a token stands for 3 x side x side of them, in fp32."""
        model = self.config.model
        return self.config.data.max_tokens * 3 * max(model.latent_stride, model.vit.patch) ** 2 * 4

    def __call__(self, task: Task) -> Filled:
        """One pack with the words and the images that this rank encodes."""
        rank = self.batches.lay_out(self.rules.pack(task.plan, task.documents))
        vits, vaes, model = rank.vit_images, rank.vae_images, self.config.model
        patch, stride = model.vit.patch, model.latent_stride
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by (sample, slot): an image is decoded once
        for sample, vit in vits:
            sizes.setdefault((sample, vit.slot), []).append((vit.rows * patch, vit.cols * patch))
        encoded = vaes if self.latents is None else []
        for image in encoded:
            sizes.setdefault((image.sample, image.slot), []).append((image.rows * stride, image.cols * stride))
        token_ids, unread = self._token_ids(task, rank.pack.samples)
        views, lost = self._views(task, sizes, unread)
        patches = [patchify(torch.nan_to_num(next(views[sample, vit.slot])), patch) for sample, vit in vits]
        pixels = [next(views[image.sample, image.slot]) for image in encoded]
        moments, missed = (None, ()) if self.latents is None else self._moments(task, vaes, self.latents, unread)
        if unread:  # nothing is learned from a sample without its text
            pack = rank.pack
            rank = replace(rank, pack=replace(pack, ce_S=pack.ce_S & ~np.isin(pack.sample_S, list(unread))))
        batch = self.batches.build(rank, np.array(token_ids, np.int64), patches, pixels, moments)
        return Filled(batch, lost + missed + tuple(unread.values()))

    def _token_ids(self, task: Task, samples: tuple[SamplePlan, ...]) -> tuple[list[int], dict[int, LostImage]]:
        """The token ids of all samples, and by number the samples of which a text cannot be had, written as `eos`."""
        writer = Writer(self.tokenizer)
        words: list[int] = []
        unread: dict[int, LostImage] = {}
        for number, (document, sample) in enumerate(zip(task.documents, samples, strict=True)):

            def ids(
                slot: int, number: int = number, document: Document = document, source: str = sample.key.source
            ) -> list[int]:
                item = document.items[slot]
                assert isinstance(item, TextItem)
                try:
                    return self.tokenizer.encode(self.indexes[source].text(item))
                except SampleError as error:
                    unread[number] = _lost(task, number, slot, error, "text")
                    return [writer.eos] * item.n_ids

            words += writer.words(sample.items, ids)
        return words, unread

    def _views(
        self, task: Task, sizes: Mapping[tuple[int, int], list[tuple[int, int]]], unread: Collection[int]
    ) -> tuple[dict[tuple[int, int], Iterator[torch.Tensor]], tuple[LostImage, ...]]:
        """The views [3, height, width] in [-1, 1] of images (sample, slot), all decoded in one call; NaN for one that
        cannot be had."""
        keys = [visit.key for visit in task.plan.visits]
        found: dict[tuple[int, int], Views | SampleError] = {}
        requests: dict[tuple[int, int], Request] = {}
        for (sample, slot), wanted in sizes.items():
            try:
                _refuse(sample, unread)
                blob = self._file(keys[sample].source, task.documents[sample], slot)
                requests[sample, slot] = Request(blob, tuple(wanted))
            except SampleError as error:
                found[sample, slot] = error
        found |= zip(requests, self.decode(list(requests.values())), strict=True)
        views, lost = {}, []
        for (sample, slot), wanted in sizes.items():
            outcome = found[sample, slot]
            if isinstance(outcome, SampleError):
                lost.append(_lost(task, sample, slot, outcome))
                outcome = [torch.full((3, *size), torch.nan) for size in wanted]
            views[sample, slot] = iter(outcome)
        return views, tuple(lost)

    def _moments(
        self, task: Task, images: Sequence[VaeImage], cache: LatentCache, unread: Collection[int]
    ) -> tuple[list[torch.Tensor], tuple[LostImage, ...]]:
        """The codec's moments of images [C, h, w]; NaN for one that cannot be had."""
        stride, cells = self.config.model.latent_stride, self.config.model.latent_patch
        moments, lost = [], []
        for image in images:
            source, document = task.plan.visits[image.sample].key.source, task.documents[image.sample]
            try:
                _refuse(image.sample, unread)
                blob = self._file(source, document, image.slot)
                moments.append(cache.read(blob, image.rows * stride, image.cols * stride))
            except SampleError as error:
                lost.append(_lost(task, image.sample, image.slot, error))
                moments.append(torch.full((cache.channels, image.rows * cells, image.cols * cells), torch.nan))
        return moments, tuple(lost)

    def _file(self, source: str, document: Document, slot: int) -> bytes:
        item = document.items[slot]
        assert isinstance(item, ImageItem)
        return self.indexes[source].image(item)


def _refuse(sample: int, unread: Collection[int]) -> None:
    """Raise SampleError for an image of a sample whose text is lost: it would be learned with a wrong text."""
    if sample in unread:
        raise SampleError("its text is lost")


def _lost(task: Task, sample: int, slot: int, error: SampleError, what: str = "image") -> LostImage:
    key, name = task.plan.visits[sample].key, task.documents[sample].key
    return LostImage(key, slot, f"source {key.source}, sample {name}: {what} lost: {error}")
