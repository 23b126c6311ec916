"""Typical workload of a run, without data: samples of assumed sizes, packed by the code that training uses.

The assumed sizes of documents are the constants below. Everything after them (resizing, items, dropout, packs, mask,
layout over context-parallel ranks) is the code of the run. Random numbers are keyed, so a plan repeats exactly.

A micro-batch is reduced to a `Load`: the rows, pairs and pixels that one rank handles, averaged over the drawn packs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from megabagel.config.schema import Config, SourceConfig
from megabagel.data.decode.transforms import resize_target
from megabagel.errors import UserError
from megabagel.sequence.flops import Flops, count_flops, relative_time, vae_flops
from megabagel.sequence.images import ImageShares, vae_images, vit_images
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.layout import Layout, build_layout, layout_rows
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.packing import choose_pack, turns
from megabagel.sequence.sample import Dropout, SamplePlan, plan_sample
from megabagel.sequence.sizes import pack_size

PACKS = 24
"""Packs sampled: enough that their mean varies by about a percent."""

TEXT_TOKENS = {
    "document": (400, 3000),
    "caption": (40, 250),
    "question": (10, 60),
    "answer": (50, 400),
    "edit": (8, 60),
}
"""Token ids of a text by its part, uniform between the two. An assumption: the paper gives no lengths."""
IMAGE_SIDE = (480, 1600)
"""Pixels of an image's shorter side before resizing, uniform. An assumption."""
ASPECTS = (1.0, 4 / 3, 3 / 2, 16 / 9)
"""Long side over short side, drawn evenly, either way up."""
FRAMES = (4, 8)
"""Frames of a clip. An assumption."""
TURNS = (2, 4)
"""Text-image pairs of an interleaved document. An assumption."""


@dataclass(frozen=True)
class Load:
    """One micro-batch on the rank that has the most of each quantity; means over packs."""

    rows_und: float
    """Rows of this context-parallel rank with the understanding expert, padding included."""
    rows_gen: float
    pairs: float
    """(query, key) pairs that the mask lets through, of its queries."""
    keys: float
    """Rows of all context-parallel ranks: keys and values that it gathers."""
    ce_rows: float
    vit_patches: float
    vit_pairs: float
    vae_flops: float
    """Of the images that the busiest rank of the stage encodes; 0 with data.latents."""
    largest_image: float
    """Pixels of the largest image in any pack that the codec encodes; 0 with data.latents."""
    inputs: float
    """fp32 numbers of a micro-batch's inputs on the first stage: patches, noised latents and targets."""

    @property
    def rows(self) -> float:
        """Rows of this rank."""
        return self.rows_und + self.rows_gen


@dataclass(frozen=True)
class Workload:
    """Packs of a run."""

    config: Config
    packs: tuple[Pack, ...]

    @cached_property
    def tokens(self) -> float:
        """Tokens per pack, padding left out."""
        return float(np.mean([pack.tokens for pack in self.packs]))

    @cached_property
    def gen_share(self) -> float:
        """Share of tokens that are the generation expert's."""
        return float(np.mean([pack.tokens_gen for pack in self.packs])) / self.tokens

    @cached_property
    def flops(self) -> Flops:
        """FLOPs of a pack, in both conventions (see `sequence.flops`)."""
        total = sum((count_flops(pack_size(pack), self.config.model) for pack in self.packs), Flops())
        return Flops(*(part / len(self.packs) for part in vars(total).values()))

    @cached_property
    def _layouts(self) -> dict[int, list[Layout]]:
        """Layouts of all packs by context-parallel size, cached because they are slow to build."""
        return {}

    def load(self, cp: int, tp: int) -> Load:
        """The load of the busiest rank, by quantity, on a grid of cp x tp ranks per stage."""
        if cp not in self._layouts:
            chunk = self.config.parallel.chunk
            rows = layout_rows(self.config.data.max_tokens, chunk, cp)
            self._layouts[cp] = [build_layout(pack, rows, chunk, cp) for pack in self.packs]
        table = [_load(self.config, p, layout, tp) for p, layout in zip(self.packs, self._layouts[cp], strict=True)]
        means = np.mean([[*vars(load).values()] for load in table], 0).tolist()
        # Field 8, largest_image: it sizes buffers, so the maximum over packs counts and not the mean.
        means[8] = max(load.largest_image for load in table)
        return Load(*means)

    def imbalance(self, dp: int) -> float:
        """Busiest data-parallel rank over the mean, in the work that differs from pack to pack (attention, images).

        The packs of a step are drawn again from these, and dealt to ranks as a run deals them.
        """
        train = self.config.train
        loads = [relative_time(pack_size(pack), self.config.model) for pack in self.packs]
        draw = generator(train.seed, "plan", "imbalance")
        step = [loads[i] for i in draw.integers(0, len(loads), train.packs_per_step)]
        sums = np.array(step)[np.array(turns(step, dp))].sum(0)
        return float(sums.max() / sums.mean())


def _load(config: Config, pack: Pack, layout: Layout, tp: int) -> Load:
    visible = np.append(pack.visible_S, 0)
    cp = layout.cp
    pairs = max(float(visible[layout.rank(rank)].sum()) for rank in range(cp))
    ce = np.append(pack.ce_S, False)
    patches = [image.rows * image.cols for _, image in vit_images(pack)] if config.model.visual_und else []
    encoded = vae_images(pack) if config.data.latents is None else []  # else read from the cache
    pixels = [image.tokens * config.model.latent_stride**2 for image in encoded]
    encoding = [vae_flops(config.model.vae, n, n**2) for n in pixels]
    seen = [sum(patches[i] for i in part) for part in ImageShares.of(patches, cp).dealt]
    und = float(np.mean(layout.num_und))
    gen = layout.rows - und
    return Load(
        rows_und=und,
        rows_gen=gen,
        pairs=pairs,
        keys=float(len(layout.token_K)),
        ce_rows=max(float(ce[layout.rank(rank)].sum()) for rank in range(cp)),
        vit_patches=float(max(seen)),
        vit_pairs=float(sum(n**2 for n in patches)) / cp,
        vae_flops=max(sum(encoding[i] for i in part) for part in ImageShares.of(pixels, cp * tp).dealt),
        largest_image=float(max(pixels, default=0)),
        inputs=max(seen) * 3 * config.model.vit.patch**2 + 2 * gen * config.model.latent_dim,
    )


def typical_workload(config: Config, packs: int = PACKS) -> Workload:
    """Packs of `config`'s mixture, filled with typical samples.

    Raises UserError when the config names no sources: the mixture of tasks would be unknown.
    """
    sources = [source for source in config.data.sources if source.weight > 0]
    if not sources:
        raise UserError("data.sources is empty: expected at least one, so that the plan knows what a pack holds")
    stream, data = _samples(config, sources), config.data
    window: list[SamplePlan] = []
    chosen: list[Pack] = []
    while len(chosen) < packs:
        while len(window) < data.lookahead:
            window.append(next(stream))
        picked = choose_pack([plan.tokens for plan in window], data.min_tokens, data.max_tokens)
        chosen.append(build_pack([window[i] for i in picked]))
        window = [plan for i, plan in enumerate(window) if i not in picked]
    return Workload(config, tuple(chosen))


def _samples(config: Config, sources: list[SourceConfig]) -> Iterator[SamplePlan]:
    """Sample plans without end; those longer than the limit are left out, as in a run."""
    data, seed = config.data, config.train.seed
    weights = np.array([source.weight for source in sources])
    dropout = Dropout(data.drop_text, data.drop_vit, data.drop_latent)
    limit = data.max_sample_tokens or data.max_tokens
    refused = 0
    for number in count():
        draw = generator(seed, "plan", number)
        source = sources[int(draw.choice(len(sources), p=weights / weights.sum()))]
        key = SampleKey(seed, source.name, number, 0)
        plan = plan_sample(_Document(config, draw).items(source.task), key, dropout, data.dropped_images_advance)
        refused = 0 if 0 < plan.tokens <= limit else refused + 1
        if not refused:
            yield plan
        elif refused == 1000:
            raise UserError(
                f"data.max_tokens = {data.max_tokens}, data.max_sample_tokens = {data.max_sample_tokens}: no typical "
                "sample of data.sources fits; raise the limit or lower the image sizes"
            )


@dataclass(frozen=True)
class _Document:
    """Draws the items of one sample, each image in the token sets that its role asks for (see `data.expand`)."""

    config: Config
    draw: np.random.Generator

    def items(self, task: str) -> list[Item]:
        """Items of one sample of a task."""
        match task:
            case "text":
                return [self._text(0, "document", loss=True)]
            case "t2i" | "reward":
                return [self._text(0, "caption"), self._made(1, self._size())]
            case "i2t":
                return [self._seen(0, self._size()), self._text(1, "question"), self._text(2, "answer", loss=True)]
            case "edit":
                size = self._size()
                return [*self._shown(0, size), self._text(1, "edit"), self._made(2, size)]
            case "reconstruct":
                size = self._size()
                return [self._seen(0, size), self._text(1, "edit"), self._made(2, size)]
            case "video":
                return self._video()
            case _:
                return self._interleaved()

    def _interleaved(self) -> list[Item]:
        """Texts, each followed by a generated image; all but the last are shown again, clean."""
        result: list[Item] = []
        turns = int(self.draw.integers(TURNS[0], TURNS[1] + 1))
        for turn in range(turns):
            size = self._size()
            result += [self._text(2 * turn, "caption", loss=True), self._made(2 * turn + 1, size)]
            result += self._shown(2 * turn + 1, size) if turn + 1 < turns else []
        return result if self.config.model.visual_gen else [i for i in result if not isinstance(i, Latent)]

    def _video(self) -> list[Item]:
        """A text and a clip in two groups of frames."""
        frames, size = int(self.draw.integers(FRAMES[0], FRAMES[1] + 1)), self._size()
        made = [self._made(slot + 1, size) for slot in range(frames)]
        groups = (made[: frames // 2], made[frames // 2 :])
        return [self._text(0, "caption"), *(Clip(tuple(g), (1,) * len(g), chain=0) for g in groups)]

    def _text(self, slot: int, part: str, loss: bool = False) -> Text:
        low, high = TEXT_TOKENS[part]
        most = (self.config.data.max_sample_tokens or self.config.data.max_tokens) // 4
        return Text(slot, int(self.draw.integers(min(low, most), min(high, most) + 1)), loss, droppable=not loss)

    def _size(self) -> tuple[int, int]:
        """Width and height of an image, pixels."""
        short = int(self.draw.integers(*IMAGE_SIDE))
        long = round(short * ASPECTS[int(self.draw.integers(len(ASPECTS)))])
        return (short, long) if self.draw.random() < 0.5 else (long, short)

    def _made(self, slot: int, size: tuple[int, int], noised: bool = True) -> Latent:
        stride = self.config.model.latent_stride
        width, height = resize_target(*size, self.config.data.vae_resize, stride)
        return Latent(slot, height // stride, width // stride, noised, droppable=not noised)

    def _seen(self, slot: int, size: tuple[int, int], droppable: bool = False) -> Vit:
        patch = self.config.model.vit.patch
        width, height = resize_target(*size, self.config.data.vit_resize, patch)
        return Vit(slot, height // patch, width // patch, droppable)

    def _shown(self, slot: int, size: tuple[int, int]) -> list[Item]:
        """A clean image: its latents and its ViT tokens, as far as the model has the branches."""
        seen: list[Item] = [self._seen(slot, size, droppable=True)] if self.config.model.visual_und else []
        return [self._made(slot, size, noised=False), *seen]
