"""Random items, segments and packs for hypothesis."""

from typing import NamedTuple

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from megabagel.sequence.items import Clip, Item, Latent, Mode, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.sample import Dropout, Segment, plan_sample
from tests.support.oracle import Token, tokens_of


def examples(count: int) -> settings:
    """Settings of a property: so many examples, however slow the machine is at the moment."""
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


SIDE = st.integers(1, 3)
STEP = st.none() | st.integers(1, 4)


@st.composite
def sample_items(draw: st.DrawFn, max_parts: int = 5) -> list[Item]:
    """Items of one sample: texts, seen images, generated images with or without their clean copies, clips, chains.

    No two items are equal, so that a plan's items tell which ones were dropped.
    """
    parts = draw(st.lists(st.sampled_from(list(PARTS)), min_size=1, max_size=max_parts))
    items: list[Item] = []
    for number, part in enumerate(parts):
        items += PARTS[part](draw, 20 * number)  # a part uses fewer than 20 slots
    return items


def _text(draw: st.DrawFn, slot: int) -> list[Item]:
    return [Text(slot, draw(st.integers(0, 6)), loss=draw(st.booleans()), droppable=draw(st.booleans()))]


def _seen(draw: st.DrawFn, slot: int) -> list[Item]:
    return [Vit(slot, draw(SIDE), draw(SIDE), droppable=draw(st.booleans()))]


def _given(draw: st.DrawFn, slot: int) -> list[Item]:
    """An image to edit: clean latents, then ViT."""
    clean = Latent(slot, draw(SIDE), draw(SIDE), noised=False, droppable=draw(st.booleans()))
    return [clean, Vit(slot, draw(SIDE), draw(SIDE), droppable=draw(st.booleans()))]


def _generated(draw: st.DrawFn, slot: int) -> list[Item]:
    """A generated image, with the clean copy and the ViT tokens that later items look at."""
    rows, cols = draw(SIDE), draw(SIDE)
    copies: list[Item] = [
        Latent(slot, rows, cols, noised=False, droppable=draw(st.booleans())),
        Vit(slot, draw(SIDE), draw(SIDE), droppable=draw(st.booleans())),
    ]
    return [Latent(slot, rows, cols, noised=True), *copies[: draw(st.integers(0, 2))]]


def _frames(draw: st.DrawFn, slot: int, noised: bool, count: int) -> tuple[Latent, ...]:
    return tuple(Latent(slot + i, draw(SIDE), draw(SIDE), noised) for i in range(count))


def _clip(draw: st.DrawFn, slot: int) -> list[Item]:
    frames = _frames(draw, slot, draw(st.booleans()), draw(st.integers(1, 3)))
    return [Clip(frames, tuple(draw(STEP) for _ in frames))]


def _chain(draw: st.DrawFn, slot: int) -> list[Item]:
    """Groups of one diffusion-forcing chain; words or another image may stand between them."""
    chain = draw(st.integers(0, 2))
    items: list[Item] = []
    for group in range(draw(st.integers(2, 4))):
        frames = _frames(draw, slot + 2 * group, True, draw(st.integers(1, 2)))
        items.append(Clip(frames, tuple(draw(STEP) for _ in frames), chain))
        if draw(st.integers(0, 3)) == 0:
            between = slot + 10 + group
            items.append(draw(st.sampled_from([Text(between, 1), Latent(between, 1, 2, noised=True)])))
    return items


PARTS = {"text": _text, "seen": _seen, "given": _given, "generated": _generated, "clip": _clip, "chain": _chain}


class Drawn(NamedTuple):
    """A pack, the items of its samples, and the tokens that these should have become."""

    pack: Pack
    items: list[list[Item]]
    tokens: list[list[Token]]


def lay_end_to_end(samples: list[list[Item]]) -> Drawn:
    """Pack samples of which nothing is dropped."""
    plans = [plan_sample(items, SampleKey(3, "drawn", i, 0), Dropout()) for i, items in enumerate(samples)]
    return Drawn(build_pack(plans), samples, [tokens_of(items) for items in samples])


@st.composite
def packs(draw: st.DrawFn) -> Drawn:
    """Packs of one to three samples."""
    return lay_end_to_end([draw(sample_items(max_parts=4)) for _ in range(draw(st.integers(1, 3)))])


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """A segment of any mode and length; noised ones alone or in one of three chains."""
    mode = draw(st.sampled_from(Mode))
    chain = draw(st.none() | st.integers(0, 2)) if mode is Mode.NOISE else None
    return Segment(mode, draw(st.integers(1, 5)), chain)
