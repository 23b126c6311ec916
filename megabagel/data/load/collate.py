"""Collation: turns a planned pack into a packed batch (layout, token ids, decoded images).

The order of samples comes from the global plan; nothing here changes it. An image that cannot be read or decoded
although it was sound at indexing time keeps its tokens, so that the layout of the pack stays as planned: its pixels for
the VAE (or cached moments) become NaN, which the model side turns into rows without loss, and its ViT patches become
mid-grey.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megabagel.config.schema import Config
from megabagel.data.decode import DecodeEngine, Request, Views
from megabagel.data.documents import Document, ImageItem, SampleError, TextItem
from megabagel.data.index.index import Index
from megabagel.data.load.latent_weights import latent_weights
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
    """An image (or text) that could not be read: the visit, the slot in its document, and the message to log."""

    key: SampleKey
    slot: int
    message: str


@dataclass(frozen=True)
class Filled:
    """A packed batch, and the images that could not be read."""

    batch: PackedBatch
    lost: tuple[LostImage, ...]


@dataclass(frozen=True)
class Filler:
    """Callable that turns a `Task` into a `Filled` batch of one rank. Picklable: each worker process has a copy.

    `indexes`: per source, used for their readers only; documents arrive with the tasks. `batches`: selects and lays out
    the rows of this rank. `latents`: cached VAE moments to read instead of encoding pixels, or None.
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
        """The filler for the packs of a plan.

        Args:
            plan: global plan of the run; gives config, rules and sources.
            tokenizer: encodes texts.
            decode: decodes image files.
            batches: builds the batch of this rank.
            latents: cache of VAE moments, or None to pass pixels to the VAE.
        """
        # Without documents: they are large, every worker gets a copy of this object, and tasks carry those needed.
        indexes = {name: replace(source.index, documents=(), skipped=()) for name, source in plan.sources.items()}
        return cls(plan.rules, indexes, tokenizer, decode, plan.config, batches, latents)

    @property
    def most_bytes(self) -> int:
        """Upper bound in bytes of the images of one pack: each token covers 3 x side x side values in fp32."""
        model = self.config.model
        return self.config.data.max_tokens * 3 * max(model.latent_stride, model.vit.patch) ** 2 * 4

    def __call__(self, task: Task) -> Filled:
        """Fill one pack: all token ids, and the images that this rank encodes."""
        rank = self.batches.lay_out(self.rules.pack(task.plan, task.documents))
        vits, vaes, model = rank.vit_images, rank.vae_images, self.config.model
        patch, stride = model.vit.patch, model.latent_stride
        # Keyed by (sample, slot), so that an image that is used several times is read and decoded once.
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for sample, vit in vits:
            sizes.setdefault((sample, vit.slot), []).append((vit.rows * patch, vit.cols * patch))
        encoded = vaes if self.latents is None else []
        for image in encoded:
            sizes.setdefault((image.sample, image.slot), []).append((image.rows * stride, image.cols * stride))
        token_ids, unread = self._token_ids(task, rank.pack.samples)
        weights = None
        if rank.place.first:
            weights, unscored = latent_weights(task, rank.pack, self.indexes, self.config.reward)
            unread |= {number: _lost(task, number, *what, "scores") for number, what in unscored.items()}
        views, lost = self._views(task, sizes, unread)
        # `views` has one iterator per image; it yields sizes in the order in which they were requested above (all ViT
        # uses, then all VAE uses), so the next two lines must stay in this order.
        patches = [patchify(torch.nan_to_num(next(views[sample, vit.slot])), patch) for sample, vit in vits]
        pixels = [next(views[image.sample, image.slot]) for image in encoded]
        moments, missed = (None, ()) if self.latents is None else self._moments(task, vaes, self.latents, unread)
        # A sample with a missing text has no correct condition or label: it keeps its rows, but none has cross-entropy.
        if unread:
            pack = rank.pack
            rank = replace(rank, pack=replace(pack, ce_S=pack.ce_S & ~np.isin(pack.sample_S, list(unread))))
        batch = self.batches.build(rank, np.array(token_ids, np.int64), patches, pixels, moments, weights)
        return Filled(batch, lost + missed + tuple(unread.values()))

    def _token_ids(self, task: Task, samples: tuple[SamplePlan, ...]) -> tuple[list[int], dict[int, LostImage]]:
        """Token ids of all samples, and the samples with a text that cannot be read, by sample number.

        An unreadable text is replaced by as many eos tokens as the index counted, so the layout does not change.
        """
        writer = Writer(self.tokenizer)
        words: list[int] = []
        unread: dict[int, LostImage] = {}
        for number, (document, sample) in enumerate(zip(task.documents, samples, strict=True)):
            # Loop variables are bound as default values: a closure would see those of a later iteration.
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
        """Decode all images of a pack in one call of the decode engine.

        Args:
            task: the pack.
            sizes: wanted (height, width) of every view in pixels, by (sample, slot).
            unread: samples with an unreadable text; their images are not read.

        Returns:
            Per (sample, slot) an iterator over its views, float32 [3, height, width] in [-1, 1] (NaN for an image that
            cannot be read); and the images that were lost.
        """
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
        """Cached VAE moments [C, h, w] of images, NaN for an image that is not available; and the lost images."""
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
    """Raise SampleError for an image of a sample with a lost text: it would be trained with a wrong condition."""
    if sample in unread:
        raise SampleError("its text is lost")


def _lost(task: Task, sample: int, slot: int, error: SampleError, what: str = "image") -> LostImage:
    key, name = task.plan.visits[sample].key, task.documents[sample].key
    return LostImage(key, slot, f"source {key.source}, sample {name}: {what} lost: {error}")
