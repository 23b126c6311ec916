"""What one visit shows: keyed, alike for any order of visits, drawn as the released loaders draw."""

from collections import Counter

import pytest

from megabagel.config.schema import Config, DataConfig, ModelConfig, ResizeConfig
from megabagel.data.documents import Document, ImageItem, ImageRole, Loose, Member, TextItem, assign_roles
from megabagel.data.formats.records import DeclaredText, declare
from megabagel.data.plan.augmentation import shown_items
from megabagel.data.plan.expand import Expander
from megabagel.sequence.items import Latent, Text, Vit
from megabagel.sequence.keys import SampleKey

EXPANDER = Expander.of(
    Config(
        data=DataConfig(
            vae_resize=ResizeConfig(max_size=96, min_size=32), vit_resize=ResizeConfig(max_size=112, min_size=28)
        ),
        model=ModelConfig(latent_grid=8),
    )
)


def text(words: str, *, alternative: bool = False, joined: int = 0) -> TextItem:
    return TextItem(len(words), words, None, alternative, joined)


def image(role: ImageRole | None = None, *, frame: bool = False) -> ImageItem:
    return ImageItem(48, 48, Member(0, 0, 1), role, frame)


def visits(count: int, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(5, "s", sample, epoch) for sample in range(count)]


CAPTIONS = assign_roles(
    "t2i", Document("d", (text("a"), text("bb", alternative=True), text("ccc", alternative=True), image()))
)


def test_one_caption_per_visit() -> None:
    shown = [EXPANDER.items(CAPTIONS, "t2i", key) for key in visits(300)]
    assert all(items[1:] == [Latent(3, 3, 3, noised=True)] for items in shown)
    counts = Counter(items[0] for items in shown)
    assert counts.keys() == {Text(slot, slot + 1, droppable=True) for slot in range(3)}
    assert all(abs(count - 100) < 3 * 9 for count in counts.values())


def test_another_epoch_reads_another_caption() -> None:
    first, second = ([shown_items(CAPTIONS, key)[0][0] for key in visits(60, epoch)] for epoch in (0, 1))
    same = sum(a == b for a, b in zip(first, second, strict=True))
    assert 10 < same < 30  # a third by chance


@pytest.mark.parametrize("step", [1, 7, -1])
def test_choices_do_not_depend_on_the_order_of_visits(step: int) -> None:
    """The very choices of 20 visits, made in whatever order."""
    keys = sorted(visits(20), key=lambda key: key.sample * step % 20)
    chosen = {key.sample: shown_items(CAPTIONS, key)[0][0] for key in keys}
    assert "".join(str(chosen[sample]) for sample in range(20)) == "02001012012111010202"


def test_texts_of_several_turns_are_no_alternatives() -> None:
    document = assign_roles("text", Document("d", (text("a"), text("b"), text("c", alternative=True), text("d"))))
    slots = Counter(tuple(slot for slot, _ in shown_items(document, key)) for key in visits(50))
    assert slots.keys() == {(0, 1, 3), (0, 2, 3)}


def frames_of(count: int, key: SampleKey) -> list[int]:
    """Frames that are shown of a clip that follows another image."""
    items = [TextItem(1, "x", "target"), image("look"), image("look")] + [image("look", frame=True)] * (count - 1)
    shown = shown_items(Document("d", tuple(items)), key)
    assert [slot for slot, _ in shown[:2]] == [0, 1]
    return [slot - 2 for slot, _ in shown[2:]]


def test_eight_to_twelve_frames_one_per_interval() -> None:
    sampled = [frames_of(100, key) for key in visits(400)]
    lengths = Counter(map(len, sampled))
    assert lengths.keys() == {8, 9, 10, 11, 12} and all(abs(count - 80) < 3 * 8 for count in lengths.values())
    for frames in sampled:
        for place, frame in enumerate(frames):
            assert 100 * place // len(frames) <= frame < 100 * (place + 1) // len(frames)
    ten = [frames for frames in sampled if len(frames) == 10]
    assert {frames[3] for frames in ten} == set(range(30, 40))


def test_a_short_clip_is_shown_whole() -> None:
    assert frames_of(7, visits(1)[0]) == list(range(7))
    assert all(len(frames_of(9, key)) in (8, 9) for key in visits(20))


def test_frames_share_the_pixels_of_a_view() -> None:
    """Of 40 frames 8 to 12 are looked at: their number, not 40, divides the pixels."""
    items = [image("look")] + [image("look", frame=True)] * 39 + [TextItem(2, "no", "target")]
    config = Config(data=DataConfig(vit_resize=ResizeConfig(max_size=112, min_size=28, max_pixels=28 * 28 * 12)))
    *views, answer = Expander.of(config).items(Document("d", tuple(items)), "i2t", visits(1)[0])
    assert answer == Text(40, 2, loss=True)
    assert 8 <= len(views) <= 12 and all(isinstance(view, Vit) and view.rows >= 2 for view in views)


def test_a_clip_that_is_generated_keeps_all_frames() -> None:
    items = [text("go"), image()] + [image(frame=True)] * 29
    document = assign_roles("video", Document("d", tuple(items)))
    _, *clips = EXPANDER.items(document, "video", visits(1)[0])
    assert sum(len(clip.frames) for clip in clips) == 30  # type: ignore[union-attr]


def chain(images: int) -> Document:
    """A chain of edits with two wordings per step: 0a, 0b, 1a, ..."""
    record = {
        "image_list": [f"i{i}" for i in range(images)],
        "instruction_list": [[f"{i}a", f"{i}b"] for i in range(images - 1)],
    }
    declared = declare(record, lambda _, name: Loose(name, 1), Member(0, 0, 1))
    items = [
        TextItem(len(item.text), item.text, None, item.alternative, item.joined)
        if isinstance(item, DeclaredText)
        else ImageItem(48, 48, item.place)
        for item in declared
    ]
    return assign_roles("edit", Document("d", tuple(items)))


def said(document: Document, key: SampleKey) -> str:
    """A visit in words: images by number, instructions as they stand."""
    shown = [item for _, item in shown_items(document, key)]
    names = [item.source if isinstance(item, TextItem) else item.member.path for item in shown]  # type: ignore[union-attr]
    roles = [item.role for item in shown if isinstance(item, ImageItem)]
    assert roles == ["condition", *["target"] * (len(roles) - 1)]
    return " ".join(map(str, names))


def official(images: int) -> dict[str, float]:
    """Every outcome of the released rule and its probability, by going through all draws."""
    outcomes: Counter[str] = Counter()
    for start in range(images - 1):
        ends = range(start + 1, min(start + 3, images))
        for end in ends:
            chance = 1 / (images - 1) / len(ends)
            for join in (True, False) if end - start == 2 else (False,):
                share = chance / 2 if end - start == 2 else chance
                last = images - 2 if join and end == images - 1 else end
                steps = last - start
                for draw in range(2**steps):
                    words = [f"{start + n}{'ab'[draw >> n & 1]}" for n in range(steps)]
                    if join:
                        told = f"i{start} {'. '.join(words)}. i{last}"
                    else:
                        told = " ".join([f"i{start}", *(f"{word} i{start + n + 1}" for n, word in enumerate(words))])
                    outcomes[told] += share / 2**steps
    assert abs(sum(outcomes.values()) - 1) < 1e-12
    return outcomes


@pytest.mark.parametrize("images", [2, 3, 4, 5])
def test_chains_of_edits_are_drawn_as_in_the_released_loader(images: int) -> None:
    document, count = chain(images), 4000
    seen = Counter(said(document, key) for key in visits(count))
    expected = official(images)
    assert seen.keys() == expected.keys()
    for told, chance in expected.items():
        spread = (count * chance * (1 - chance)) ** 0.5
        assert abs(seen[told] - count * chance) < 4 * spread, told
    joined = [told for told in expected if "." in told]
    share = sum(expected[told] for told in joined)
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(sum(seen[told] for told in joined) - count * share) <= 3 * spread


def test_a_part_of_a_chain_ends_with_a_picture_that_is_not_shown_again() -> None:
    document = chain(4)
    for key in visits(50):
        items = EXPANDER.items(document, "edit", key)
        assert isinstance(items[-1], Latent) and items[-1].noised
        assert [type(item) for item in items[:3]] == [Latent, Vit, Text]
        assert not items[0].noised  # type: ignore[union-attr]


def test_an_edit_of_a_tar_is_shown_whole() -> None:
    document = assign_roles("edit", Document("d", (image(), text("a"), image(), text("b"), image())))
    assert all([slot for slot, _ in shown_items(document, key)] == [0, 1, 2, 3, 4] for key in visits(10))
