"""From the plan to packed batches: reads, decodes and tokenizes this rank's share in a background thread.

Nothing here decides an order: the plan does. An image that fails although the index found it sound is replaced:
latents by NaN, which the model side turns into rows without loss, ViT patches by grey.
"""

import logging
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megabagel.config.schema import Config
from megabagel.data.decode import DecodeEngine
from megabagel.data.documents import ImageItem, SampleError, TextItem
from megabagel.data.plan import GlobalPlan, StepPlan
from megabagel.data.tokenizer import TextTokenizer
from megabagel.data.words import Writer
from megabagel.sequence.batch import Encoders, PackedBatch
from megabagel.sequence.images import vae_images, vit_images
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack
from megabagel.sequence.patches import patchify
from megabagel.sequence.sample import SamplePlan

logger = logging.getLogger(__name__)


LostImage = tuple[SampleKey, int]
"""Visit and slot of an image."""


@dataclass(frozen=True)
class Step:
    """A planned step and this rank's packed batches of it."""

    plan: StepPlan
    batches: list[PackedBatch]
    lost: frozenset[LostImage]
    """Images of this rank's batches that could not be decoded."""


class Loader:
    """Fills packs with content for one rank."""

    def __init__(
        self,
        plan: GlobalPlan,
        tokenizer: TextTokenizer,
        decode: DecodeEngine,
        config: Config,
        encoders: Encoders,
        dp: tuple[int, int] = (0, 1),
    ) -> None:
        self.plan, self.tokenizer, self.decode, self.config = plan, tokenizer, decode, config
        self.encoders, self.dp = encoders, dp
        grid = config.parallel
        self.rows = layout_rows(config.data.max_tokens, grid.chunk, grid.cp)
        self.writer = Writer(tokenizer)
        self.lost: set[LostImage] = set()
        """Images that could not be decoded, since the last step."""

    def steps(self, count: int) -> Iterator[Step]:
        """The next `count` steps, prepared `data.prefetch` ahead in a thread whose errors surface here."""
        ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=max(1, self.config.data.prefetch))
        stopped = threading.Event()

        def produce() -> None:
            for _ in range(count):
                item: Step | BaseException
                try:
                    item = self._fill(self.plan.next_step())
                except BaseException as error:
                    item = error
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set() or isinstance(item, BaseException):
                    return

        threading.Thread(target=produce, name="loader", daemon=True).start()
        try:
            for _ in range(count):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _fill(self, plan: StepPlan) -> Step:
        batches = [self.batch(plan.packs[number]) for number in plan.share(*self.dp)]
        lost, self.lost = frozenset(self.lost), set()
        return Step(plan, batches, lost)

    def batch(self, pack: Pack) -> PackedBatch:
        """One pack with the words and the images that this rank encodes."""
        grid = self.config.parallel
        layout = build_layout(pack, self.rows, grid.chunk, grid.cp)
        words = [word for sample in pack.samples for word in self._words(sample)]
        patch, stride = self.config.model.vit.patch, self.config.model.latent_stride
        seen, made = vit_images(pack), vae_images(pack)
        vits, vaes = [seen[i] for i in self.encoders.vit(pack)], [made[i] for i in self.encoders.vae(pack)]
        sizes: dict[tuple[int, int], list[tuple[int, int]]] = {}  # by (sample, slot): an image is decoded once
        for sample, vit in vits:
            sizes.setdefault((sample, vit.slot), []).append((vit.rows * patch, vit.cols * patch))
        for image in vaes:
            sizes.setdefault((image.sample, image.slot), []).append((image.rows * stride, image.cols * stride))
        views = {at: iter(self._views(pack.samples[at[0]], at[1], wanted)) for at, wanted in sizes.items()}
        patches = [patchify(torch.nan_to_num(next(views[sample, vit.slot])), patch) for sample, vit in vits]
        pixels = [next(views[image.sample, image.slot]) for image in vaes]
        return PackedBatch(pack, layout, torch.tensor(words, dtype=torch.int64), patches, pixels)

    def _words(self, sample: SamplePlan) -> list[int]:
        document = self.plan.document(sample.key)
        index = self.plan.sources[sample.key.source].index

        def ids(slot: int) -> list[int]:
            item = document.items[slot]
            assert isinstance(item, TextItem)
            return self.tokenizer.encode(index.text(item))

        return self.writer.words(sample.items, ids)

    def _views(self, sample: SamplePlan, slot: int, sizes: list[tuple[int, int]]) -> list[torch.Tensor]:
        """[3, height, width] in [-1, 1] per size; NaN if the image cannot be had."""
        index = self.plan.sources[sample.key.source].index
        document = self.plan.document(sample.key)
        item = document.items[slot]
        assert isinstance(item, ImageItem)
        try:
            return self.decode(index.read(item.member), sizes)
        except SampleError as error:
            self.lost.add((sample.key, slot))
            logger.warning("source %s, sample %s: image lost: %s", sample.key.source, document.key, error)
            return [torch.full((3, *size), torch.nan) for size in sizes]
