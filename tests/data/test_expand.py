"""Which token sets every image of a document gets, and in which order (docs/bagel.md#tasks)."""

from collections import Counter

import pytest

from megabagel.config.schema import Config, DataConfig, ModelConfig, ResizeConfig
from megabagel.data.documents import Document, ImageItem, ImageRole, Member, Task, TextItem, TextRole, assign_roles
from megabagel.data.plan.expand import Expander
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey

DATA = DataConfig(
    vae_resize=ResizeConfig(max_size=96, min_size=32),
    vit_resize=ResizeConfig(max_size=112, min_size=28, max_pixels=6272),
)
EXPANDER = Expander.of(Config(data=DATA, model=ModelConfig(latent_grid=8)))
KEY = SampleKey(1, "source", 0, 0)


def text(n_ids: int, role: TextRole | None = None) -> TextItem:
    return TextItem(n_ids, "words", role)


def image(height: int, width: int, role: ImageRole | None = None) -> ImageItem:
    return ImageItem(height, width, Member(0, 0, 1), role)


def expand(task: Task, *items: TextItem | ImageItem, key: SampleKey = KEY) -> list[Item]:
    return EXPANDER.items(assign_roles(task, Document("d", items)), task, key)


def test_text_to_image() -> None:
    """64 x 80 pixels: 4 x 5 latent tokens of 16 pixels."""
    expected = [Text(0, 7, loss=False, droppable=True), Latent(1, 4, 5, noised=True)]
    assert expand("t2i", text(7), image(64, 80)) == expected
    assert expand("t2i", image(64, 80), text(7)) == expected


def test_image_to_text() -> None:
    """70 x 56 pixels: 5 x 4 patches of 14 pixels. Nothing is dropped."""
    assert expand("i2t", text(7), image(70, 56)) == [Vit(0, 5, 4), Text(1, 7, loss=True)]


def test_edit_with_two_images() -> None:
    """60 x 30: latents 4 x 2 (30 rises to the least side, 32, times 60 / 30); patches 4 x 2."""
    assert expand("edit", image(60, 30), text(3), image(48, 64)) == [
        Latent(0, 4, 2, noised=False, droppable=True),
        Vit(0, 4, 2, droppable=True),
        Text(1, 3, loss=False, droppable=True),
        Latent(2, 3, 4, noised=True),
    ]


def test_edit_with_three_images() -> None:
    """The middle image is generated, then shown clean, then seen."""
    items = expand("edit", image(48, 48), text(3), image(48, 64), text(4), image(64, 48))
    assert items == [
        Latent(0, 3, 3, noised=False, droppable=True),
        Vit(0, 3, 3, droppable=True),
        Text(1, 3, loss=False, droppable=True),
        Latent(2, 3, 4, noised=True, droppable=False),
        Latent(2, 3, 4, noised=False, droppable=True),
        Vit(2, 3, 5, droppable=True),
        Text(3, 4, loss=False, droppable=True),
        Latent(4, 4, 3, noised=True, droppable=False),
    ]


def test_edit_that_ends_with_words_shows_its_last_image() -> None:
    items = expand("edit", image(48, 48), text(3), image(48, 48), text(5, "target"))
    assert items[3:] == [
        Latent(2, 3, 3, noised=True),
        Latent(2, 3, 3, noised=False, droppable=True),
        Vit(2, 3, 3, droppable=True),
        Text(3, 5, loss=True, droppable=False),
    ]


def test_a_thought_is_learned_and_never_dropped() -> None:
    before, instruction = image(48, 48, "condition"), text(3, "condition")
    thought, after = text(6, "target"), image(48, 48, "target")
    assert expand("interleave", before, instruction, thought, after) == [
        Latent(0, 3, 3, noised=False, droppable=True),
        Vit(0, 3, 3, droppable=True),
        Text(1, 3, loss=False, droppable=True),
        Text(2, 6, loss=True, droppable=False),
        Latent(3, 3, 3, noised=True),
    ]


def test_a_conversation_drops_nothing() -> None:
    """No image is generated: images are only seen, and questions are not conditions of guidance."""
    items = expand("interleave", image(42, 28, "look"), text(3, "condition"), text(4, "target"), text(2, "target"))
    assert items == [
        Vit(0, 3, 2, droppable=False),
        Text(1, 3, loss=False, droppable=False),
        Text(2, 4, loss=True),
        Text(3, 2, loss=True),
    ]


def test_images_that_are_looked_at_share_the_pixels() -> None:
    """98 x 98 has 9604 pixels of 6272 allowed: 98 * 6272 / 9604 = 64, which is 5 patches. Shared by two: 32, so 2."""
    assert expand("i2t", image(98, 98), text(1))[0] == Vit(0, 5, 5)
    pair = expand("interleave", image(98, 98, "look"), image(98, 98, "look"), text(1, "target"))
    assert pair == [Vit(0, 2, 2), Vit(1, 2, 2), Text(2, 1, loss=True)]
    edit = expand("edit", image(98, 98), text(1), image(98, 98), text(1), image(98, 98))
    assert [item for item in edit if isinstance(item, Vit)] == [Vit(0, 5, 5, True), Vit(2, 5, 5, True)]


def test_text_only() -> None:
    assert expand("text", text(9)) == [Text(0, 9, loss=True)]
    prompt_and_answer = [Text(0, 4, loss=False, droppable=False), Text(1, 9, loss=True)]
    assert expand("text", text(4, "condition"), text(9)) == prompt_and_answer


def test_latents_and_patches_are_sized_by_their_own_rules() -> None:
    latent, vit, *_ = expand("edit", image(200, 100), text(1), image(10, 10))
    assert (latent, vit) == (Latent(0, 6, 3, False, True), Vit(0, 8, 4, True))
    assert EXPANDER.vae_size(image(200, 100)) == (96, 48)


def clips(frames: int, key: SampleKey = KEY) -> list[Clip]:
    """The groups of a clip whose frames differ in size."""
    caption, *groups = expand("video", text(5), *(image(32, 32 + 16 * n) for n in range(frames)), key=key)
    assert caption == Text(0, 5, loss=False, droppable=True)
    assert all(isinstance(group, Clip) for group in groups)
    return [group for group in groups if isinstance(group, Clip)]


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(1, "clips", sample, 0) for sample in range(count)]


def test_video_groups_tile_the_frames_in_order() -> None:
    frames = [Latent(1 + n, 2, 2 + n, noised=True) for n in range(5)]
    for key in keys(40):
        groups = clips(5, key)
        assert [frame for group in groups for frame in group.frames] == frames
        assert all(group == Clip(group.frames, (1,) * len(group.frames), chain=0) for group in groups)


def test_video_groups_are_random_but_keyed() -> None:
    """The first group is uniform over 1 .. 5, the next over what is left; so all 16 ways to cut 5 frames occur."""
    cuts = [tuple(len(group.frames) for group in clips(5, key)) for key in keys(400)]
    assert cuts == [tuple(len(group.frames) for group in clips(5, key)) for key in keys(400)]
    assert len(set(cuts)) == 16
    first = Counter(cut[0] for cut in cuts)
    assert first.keys() == {1, 2, 3, 4, 5} and all(abs(count - 80) < 3 * 8 for count in first.values())
    second = Counter(cut[1] for cut in cuts if cut[0] == 1)
    assert second.keys() == {1, 2, 3, 4} and min(second.values()) > 0.6 * max(second.values())


@pytest.mark.parametrize(
    "other", [SampleKey(2, "clips", 3, 0), SampleKey(1, "pairs", 3, 0), SampleKey(1, "clips", 3, 1)]
)
def test_video_groups_vary_by_seed_source_and_epoch(other: SampleKey) -> None:
    def cut(key: SampleKey) -> list[int]:
        """Sizes of the groups of 30 frames."""
        (_, *groups) = expand("video", text(1), *[image(32, 32)] * 30, key=key)
        return [len(group.frames) for group in groups if isinstance(group, Clip)]

    assert cut(SampleKey(1, "clips", 3, 0)) != cut(other)


def test_several_captions_and_one_frame() -> None:
    assert expand("video", text(2), text(3), image(32, 48)) == [
        Text(0, 2, droppable=True),
        Text(1, 3, droppable=True),
        Clip((Latent(2, 2, 3, noised=True),), (1,), chain=0),
    ]
