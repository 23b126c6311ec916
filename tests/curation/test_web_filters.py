"""Every rule on documents made for it, with what goes in and what comes out."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pytest
from PIL import Image

from megabagel.curation import web as web_filters
from megabagel.curation.draft import Draft, Picture, Text
from megabagel.curation.steps import Bound, Context, Step, Tally, run_steps, table_of
from megabagel.curation.web import sharpness, split
from tests.support.pictures import file_of, noise

ENGLISH = "This is the way in which the filter works, and it is easy to use.\n\n"
GERMAN = "Der Filter macht das Bild unscharf und zeigt danach einen Hinweis.\n\n"


def picture(width: int = 200, height: int = 200, seed: int = 0, source: str = "images/x.png") -> Picture:
    return Picture(source, file_of(noise(width, height, seed=seed)))


WEB_FILTERS = [
    web_filters.interface_images,
    web_filters.missing_files,
    web_filters.damaged_files,
    web_filters.image_sides,
    web_filters.aspect_ratio,
    web_filters.image_clarity,
    web_filters.repeated_images,
    web_filters.english,
    web_filters.too_few_images,
    web_filters.long_documents_split,
]


def run(drafts: Iterable[Draft], steps: Sequence[Step]) -> tuple[list[Draft], list[Tally]]:
    tallies = [Tally(step.name) for step in steps]
    left = list(run_steps(drafts, [Bound(step) for step in steps], tallies))
    for tally in tallies:
        tally.check()
    return left, tallies


def document(key: str, *items: Picture | str) -> Draft:
    return Draft(key, tuple(Text(item) if isinstance(item, str) else item for item in items))


def kept(step: Step, *pictures: Picture) -> list[Picture]:
    (draft,) = step([document("key", "text", *pictures)])
    return draft.pictures


@pytest.mark.parametrize(
    ("source", "stays"),
    [
        ("images/dialogs/stock-eye-20.png", False),
        ("http://a.org/ICON.png", False),
        ("assets/widget/a.jpg", False),
        ("images/dialog.png", True),
        ("images/livestock.png", True),
    ],
)
def test_interface_images_go_by_their_names(source: str, stays: bool) -> None:
    assert bool(kept(web_filters.interface_images, picture(source=source))) == stays


def test_missing_and_damaged_files_go() -> None:
    sound = picture()
    half = Picture("half.png", sound.data[:2000] if sound.data else None)
    none, empty = Picture("none.png", None), Picture("empty.png", b"")
    assert kept(web_filters.missing_files, none, sound, half) == [sound, half]
    assert kept(web_filters.damaged_files, half, sound, empty) == [sound]


@pytest.mark.parametrize(("width", "height", "stays"), [(150, 150, True), (149, 150, False), (150, 149, False)])
def test_image_sides(width: int, height: int, stays: bool) -> None:
    assert bool(kept(web_filters.image_sides, picture(width, height))) == stays


def test_huge_images_go() -> None:
    line = Picture("line.png", file_of(Image.new("1", (20_001, 150))))
    edge = Picture("edge.png", file_of(Image.new("1", (20_000, 150))))
    assert kept(web_filters.image_sides, line, edge) == [edge]


@pytest.mark.parametrize(("width", "stays"), [(200, True), (400, True), (402, False), (100, True), (99, False)])
def test_aspect_ratio(width: int, stays: bool) -> None:
    assert bool(kept(web_filters.aspect_ratio, picture(width, 200))) == stays


def test_blurred_and_empty_images_go() -> None:
    blurred = noise(200, 200).resize((4, 4)).resize((200, 200), Image.Resampling.BICUBIC)
    pictures = [
        Picture(str(n), file_of(image))
        for n, image in enumerate((noise(200, 200), blurred, Image.new("L", (200, 200))))
    ]
    assert kept(web_filters.image_clarity, *pictures) == pictures[:1]


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    grey = np.random.default_rng(1).integers(0, 256, (5, 7), dtype=np.uint8)
    cells = grey.astype(float)
    values = [
        cells[r - 1, c] + cells[r + 1, c] + cells[r, c - 1] + cells[r, c + 1] - 4 * cells[r, c]
        for r in range(1, 4)
        for c in range(1, 6)
    ]
    assert sharpness(file_of(Image.fromarray(grey))) == pytest.approx(np.var(values), rel=1e-6)


def test_repeated_images_stay_once() -> None:
    first, again, other = picture(seed=1), picture(seed=1, source="copy.png"), picture(seed=2)
    (draft,) = web_filters.repeated_images([document("key", "a ", first, "b ", again, "c ", other)])
    assert draft.items == (Text("a "), first, Text("b c "), other)


def test_only_english_stays() -> None:
    drafts = [document("en", ENGLISH), document("de", GERMAN), document("none", picture())]
    assert [draft.key for draft in web_filters.english(drafts)] == ["en"]


def numbered(count: int) -> list[Picture]:
    return [Picture(str(number), None) for number in range(count)]


@pytest.mark.parametrize(
    ("images", "parts"), [(2, []), (3, [3]), (8, [8]), (9, [4, 5]), (16, [8, 8]), (17, [5, 6, 6]), (25, [6, 6, 6, 7])]
)
def test_documents_have_3_to_8_images(images: int, parts: list[int]) -> None:
    draft = document("key", *(item for image in numbered(images) for item in ("text\n\n", image)))
    found, tallies = run([draft], WEB_FILTERS[-2:])
    assert [tally.documents_added for tally in tallies] == [0, max(0, len(parts) - 1)]
    assert [len(part.pictures) for part in found] == parts
    assert [image for part in found for image in part.pictures] == (numbered(images) if parts else [])
    assert [part.key for part in found] == (
        [f"key-{n + 1}" for n in range(len(parts))] if len(parts) > 1 else ["key"] * len(parts)
    )


def test_a_document_is_cut_after_the_caption_of_an_image() -> None:
    a, b, c, d = numbered(4)
    draft = document("key", "lead", a, b, "caption of b\n\nlead of c\n\nmore", c, "only one paragraph", d, "end")
    first, second = split(draft, 2)
    assert first == document("key-1", "lead", a, b, "caption of b")
    assert second == document("key-2", "lead of c\n\nmore", c, "only one paragraph", d, "end")
    assert list(split(document("key", a, b, "leads", c, d), 2))[1] == document("key-2", "leads", c, d)


def test_a_document_is_cut_between_images_without_text() -> None:
    a, b, c, d = numbered(4)
    assert list(split(document("key", a, b, c, d), 2)) == [document("key-1", a, b), document("key-2", c, d)]


def test_the_report_counts_every_step() -> None:
    good = [picture(seed=seed) for seed in range(3)]
    drafts = [
        document("whole", ENGLISH, *good),
        document("long", ENGLISH, *(picture(seed=seed) for seed in range(9))),
        document("poor", ENGLISH, good[0], picture(source="icon.png"), Picture("gone.png", None), picture(100, 100)),
        document("german", GERMAN, *good),
        document("wide", ENGLISH, *good, picture(500, 200), good[0]),
    ]
    left, tallies = run(drafts, WEB_FILTERS)
    assert [draft.key for draft in left] == ["whole", "long-1", "long-2", "wide"]
    counts = {tally.step: (tally.documents_out, tally.pictures_out) for tally in tallies}
    assert (tallies[0].documents_in, tallies[0].pictures_in) == (5, 24)
    assert counts == {
        "interface_images": (5, 23),
        "missing_files": (5, 22),
        "damaged_files": (5, 22),
        "image_sides": (5, 21),
        "aspect_ratio": (5, 20),
        "image_clarity": (5, 20),
        "repeated_images": (5, 19),
        "english": (4, 16),
        "too_few_images": (3, 15),
        "long_documents_split": (4, 15),
    }
    reasons = {tally.step: (dict(tally.documents), dict(tally.pictures)) for tally in tallies}
    assert reasons["image_sides"] == ({}, {"a side below 150": 1})
    assert reasons["english"] == ({"not English": 1}, {"not English": 3})
    assert tallies[-1].documents_added == 1
    assert "too few images 4 3 1 16 15 1" in " ".join(table_of(tallies).split())
    assert left[3].notes == (
        "aspect_ratio: pictures dropped: 1 x aspect ratio",
        "repeated_images: pictures dropped: 1 x repeated in its document",
    )


def test_a_step_may_look_at_many_documents_at_a_time() -> None:
    """The seam for models: a batch of documents is scored in one call."""
    batches = []

    def relevance(drafts: Iterable[Draft], context: Context) -> Iterator[Draft]:
        batch = list(drafts)
        batches.append(len(batch))
        for draft, score in zip(batch, np.linspace(0, 1, len(batch)), strict=True):
            if score > 0.4:
                yield draft
            else:
                context.drop(draft, "not relevant")

    steps = [web_filters.english, Step("relevance", relevance, {})]
    left, tallies = run([document(str(n), ENGLISH) for n in range(5)], steps)
    assert [draft.key for draft in left] == ["2", "3", "4"] and batches == [5]
    assert [tally.documents_out for tally in tallies] == [5, 3] and tallies[1].documents == {"not relevant": 2}


def test_a_step_that_loses_a_document_without_a_reason_is_found() -> None:
    silent = Step("silent", lambda drafts, context: iter(list(drafts)[1:]), {})
    with pytest.raises(AssertionError, match=r"silent: documents 2 \+ 0 != 1 \+ 0"):
        run([document("a", ENGLISH), document("b", ENGLISH)], [silent])
