"""A small training run that every grid must agree on: hand-made packs of every split kind, synthetic content.

Batches mix all kinds with uneven lengths; one batch has no image at all and one has no text loss. Words and pixels are
functions of the sample, so each rank makes exactly the content that it is asked for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

import torch

from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig, VitConfig
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.rank_rows import LatentWeights
from megabagel.sequence.sample import TEXT, Dropout, plan_sample

PACKS = 4


def base_config() -> Config:
    """A model with odd depth, 8 heads over 4 kv heads, and a window of 160 tokens."""
    vit = VitConfig(layers=2, hidden=32, heads=4, ffn=48, grid=8)
    model = ModelConfig(
        layers=5, hidden=64, heads=8, kv_heads=4, head_dim=16, ffn=96, vocab=64, vit=vit, latent_grid=8, init_std=0.1
    )
    train = TrainConfig(steps=10, seed=7, lr=2e-3, warmup=2, packs_per_step=PACKS, clip=1.0, ema=0.9)
    data = DataConfig(min_tokens=100, max_tokens=160)
    return Config(model=model, train=train, data=data, parallel=ParallelConfig(chunk=8))


def on_grid(config: Config, tp: int, pp: int, vpp: int, cp: int, **options: object) -> Config:
    """The same run on another grid."""
    return replace(config, parallel=replace(config.parallel, tp=tp, pp=pp, vpp=vpp, cp=cp, **options))


def samples(step: int) -> list[list[list[Item]]]:
    """Items of every sample of every pack of a step."""
    draw, slots = generator("scenario", step), count(100)

    def n(low: int, high: int) -> int:
        return int(draw.integers(low, high))

    def text(loss: bool) -> Text:
        return Text(0, n(1, 17), loss)

    def image(kind: type, **options: bool) -> Item:
        return kind(next(slots), n(1, 4), n(1, 5), **options)

    def edit() -> list[Item]:
        target = Latent(next(slots), n(1, 4), n(1, 5), noised=True)
        return [
            image(Latent, noised=False), image(Vit), text(False),
            target, replace(target, noised=False), image(Vit), text(True), image(Latent, noised=True),
        ]  # fmt: skip

    def clip() -> list[Item]:
        frame = [Latent(slot, 2, n(1, 3), noised=True) for slot in range(4)]
        return [text(False), *(Clip(tuple(group), (1,) * len(group), chain=0) for group in (frame[:2], frame[2:]))]

    def seen_clip() -> list[Item]:
        frame = [Latent(slot, 1, 3, noised=True) for slot in range(3)]
        return [Clip(tuple(frame), (2, 2, None)), text(step != 4)]

    if step == 3:  # no image in the whole batch
        return [[[text(True)] for _ in range(n(2, 6))] for _ in range(PACKS)]
    if step == 4:  # no text loss in the whole batch
        return [[[text(False), image(Latent, noised=True)], seen_clip(), clip()] for _ in range(PACKS)]
    return [
        [[text(False), image(Latent, noised=True)], edit(), [text(True)]],
        [[image(Vit), image(Vit), text(True), text(True)], clip()],
        [[text(True)], [text(True)], [image(Vit), text(True)]],
        [[text(False), image(Latent, noised=True)], seen_clip(), edit()],
    ]


def packs(config: Config, step: int) -> list[Pack]:
    """The packs of a step."""
    return [
        build_pack([
            plan_sample(items, SampleKey(config.train.seed, f"pack {number}", index, step), Dropout())
            for index, items in enumerate(pack)
        ])
        for number, pack in enumerate(samples(step))
    ]  # fmt: skip


def batch(batches: BatchBuilder, pack: Pack, weights: LatentWeights | None = None) -> PackedBatch:
    """A pack with synthetic words, patches and pixels."""
    rank, config = batches.lay_out(pack), batches.config
    draw = generator("words", pack.samples[0].key.source, pack.samples[0].key.epoch)
    token_ids = draw.integers(0, config.model.vocab, int((pack.kind_S == TEXT).sum()))

    def pixels(sample: int, slot: int, *shape: int) -> torch.Tensor:
        key = pack.samples[sample].key
        values = generator("pixels", key.source, key.sample, key.epoch, slot).uniform(-1, 1, shape)
        return torch.from_numpy(values).float()

    patches = [
        pixels(sample, vit.slot, vit.rows * vit.cols, 3 * config.model.vit.patch**2) for sample, vit in rank.vit_images
    ]
    stride = config.model.latent_stride
    images = [
        pixels(image.sample, image.slot, 3, image.rows * stride, image.cols * stride) for image in rank.vae_images
    ]
    return batches.build(rank, token_ids, patches, images, latent_weights=weights)


class Harness:
    """One rank of the scenario inside a running process group."""

    def __init__(self, config: Config) -> None:
        from megabagel.model.vae import build_codec
        from megabagel.parallel import mesh
        from megabagel.parallel.attention import HOST
        from megabagel.runtime import cpu_backend
        from megabagel.train.build_rank import build_rank

        cpu_backend.install()
        self.config, self.grid = config, mesh.build(config)
        rank = build_rank(config, self.grid, HOST, build_codec(config.model.vae))
        self.optimizer, self.runner = rank.optimizer, rank.runner
        self.batches, self.builder = rank.batches, rank.builder

    def step(self, number: int, share: Sequence[int] | None = None) -> dict[str, float]:
        """Train one step; `share` names this rank's packs (default: dealt in turn)."""
        from megabagel.train.schedule import learning_rate
        from megabagel.train.step import denominators

        whole = packs(self.config, number)
        size = self.grid.dp.size
        mine = share if share is not None else range(self.grid.dp.rank, len(whole), size)
        inputs = [self.builder.build(batch(self.batches, whole[index])) for index in mine]
        counts = denominators(self.config.train, [whole[turn : turn + size] for turn in range(0, len(whole), size)])
        losses, norm = self.runner.train(inputs, counts, learning_rate(self.config.train, number))
        return {"ce": losses.ce, "mse": losses.mse, "total": losses.total, "norm": norm}


def curve(config: Config, steps: int = 10) -> list[dict[str, float]]:
    """Run the scenario; every rank returns losses and gradient norms by step."""
    return list(_steps(config, steps))


def _steps(config: Config, steps: int) -> Iterator[dict[str, float]]:
    harness = Harness(config)
    for number in range(steps):
        yield harness.step(number)
