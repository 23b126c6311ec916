"""Steps that need all documents: near-duplicates, repeated paragraphs, topics, captions, concepts."""

from pathlib import Path
from typing import Any

import pytest

from megabagel.curation.draft import Draft, Picture, Text
from megabagel.curation.recipe import all_steps
from megabagel.curation.steps import Bound, Tally, run_steps
from megabagel.curation.topics import fit, label_by_rules
from megabagel.data.formats.shards import write_shards
from megabagel.errors import UserError
from tests.curation.conftest import Inline, curated
from tests.support.pictures import file_of, noise


def two_passes(name: str, partitions: dict[str, list[Draft]], **given: Any) -> tuple[list[str], Tally]:
    """Keys of what a step keeps of documents in several partitions, and its counts."""
    step = all_steps()[name]
    options = {option: parameter.default for option, parameter in step.options.items()} | given
    assert step.sketch and step.reduce
    rows = [
        (
            partition,
            [[draft.key, found] for draft in drafts if (found := step.sketch(draft, None, **options)) is not None],
        )
        for partition, drafts in partitions.items()
    ]
    tables = step.reduce(iter(rows), **options)
    tally, left = Tally(name), []
    for partition, drafts in partitions.items():
        table = tables.get(partition, tables.get("", {}))
        left += list(run_steps(drafts, [Bound(step, options, table)], [tally]))
    tally.check()
    return [f"{draft.key}:{len(draft.pictures)}:{draft.text}" for draft in left], tally


def picture(seed: int, **how: Any) -> Picture:
    small = noise(12, 9, seed=seed).resize((200, 150))
    return Picture(f"{seed}.png", file_of(small, **how))


def test_near_duplicates_over_partitions_stay_once() -> None:
    partitions = {
        "000000": [Draft("a", (picture(1), picture(2))), Draft("b", (picture(1),))],
        "000001": [Draft("c", (picture(3), picture(2, format="JPEG"), picture(3)))],
    }
    kept, tally = two_passes("near_duplicates", partitions)
    assert kept == ["a:2:", "b:0:", "c:1:"] and tally.pictures == {"near duplicate": 3}
    with pytest.raises(UserError, match=r"near_duplicates.bits: 9; expected 0 to 7"):
        two_passes("near_duplicates", partitions, bits=9)


def test_paragraphs_of_many_pages_of_a_site_go() -> None:
    pages = {
        "000000": [
            Draft(str(n), (Text(f"Home | About\n\nText {n}.\n\nBoth"),), f"http://{'a' if n < 5 else 'b'}.org/{n}")
            for n in range(7)
        ]
    }
    kept, _ = two_passes("repeated_paragraphs", pages, pages=4)
    assert kept[0] == "0:0:Text 0." and kept[6] == "6:0:Home | About\n\nText 6.\n\nBoth"


def test_a_classifier_learns_from_the_labels_of_a_part() -> None:
    how = "To install it click here, then follow the steps of this tutorial number"
    what = "The river is a tributary that was known as the great water in the last century near town"
    ads = "Buy cheap shoes online today with free shipping and great discount number"
    texts = [f"{text} {n}" for n in range(30) for text in (how, what, ads)]
    partitions = {"000000": [Draft(str(n), (Text(text),)) for n, text in enumerate(texts)]}
    kept, tally = two_passes("topic", partitions, keep=["tutorial"], share=0.5)
    assert len(kept) == 30 and all("click here" in line for line in kept)
    assert tally.documents == {"topic encyclopedia": 30, "topic none": 30}
    assert label_by_rules("click click", {"a": ["click"]}) == "none"  # one keyword is chance
    assert fit([(0, [1]), (1, [2])], 2)[1].argmax() == 0


def test_captions_that_many_have() -> None:
    drafts = {
        str(n): [Draft(f"{n}{i}", (Text("Click to  ENLARGE" if i else f"cat {n}"),)) for i in range(2)]
        for n in range(4)
    }
    kept, tally = two_passes("repeated_captions", drafts, most=2)
    assert len(kept) == 6 and tally.documents == {"repeated caption": 2}


def test_rare_concepts_stay_and_frequent_ones_are_thinned() -> None:
    drafts = {
        "0": [
            Draft(str(n), (Text("a photo of a cat" if n < 2000 else f"photo of species{'x' * (n % 7)}"),))
            for n in range(2007)
        ]
    }
    kept, tally = two_passes("balance_concepts", drafts, limit=200)
    cats = sum("cat" in line for line in kept)
    assert len(kept) - cats == 7 and 150 < cats < 250  # 200 are expected, with a deviation of 13
    assert tally.documents == {"frequent concept": 2000 - cats}


def test_pairs_of_a_folder_and_of_shards(tmp_path: Path, inline: Inline) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for n in range(6):
        (folder / f"{n}.png").write_bytes(file_of(noise(300, 260, seed=n)))
        if n != 2:
            (folder / f"{n}.txt").write_text(f"A picture of thing number {n}." if n != 3 else "x")
    (folder / "4.png").write_bytes(file_of(noise(300, 260, seed=0)))
    (folder / "5.png").write_bytes(b"no image")
    recipe = {
        "name": "pairs",
        "read": {"kind": "pairs", "images_per_partition": 2},
        "steps": ["damaged_files", {"image_sides": {"least": 256}}, "aspect_ratio", "image_clarity", "near_duplicates",
                  "one_picture", "caption_length", "repeated_captions", "balance_concepts"],
        "write": {"layout": "captioned"},
    }  # fmt: skip
    report = curated(recipe, folder, tmp_path / "out")
    dropped = {tally.step: dict(tally.documents) for tally in report.steps if tally.documents}
    assert report.samples == 2 and report.read == {"image without a caption": 1, "pair": 5}
    assert dropped == {
        "one_picture": {"no picture left": 2},
        "caption_length": {"caption too short": 1, "no caption": 1},
    }

    again = curated({**recipe, "name": "again"}, tmp_path / "out" / "shards", tmp_path / "again")
    assert again.samples == 2 and again.read == {"pair": 2}
    interleaved = {**recipe, "read": {"kind": "samples"}, "write": {}, "steps": []}
    assert curated(interleaved, tmp_path / "out" / "shards", tmp_path / "samples").samples == 2


def test_broken_shards_cost_themselves(tmp_path: Path, inline: Inline) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    samples = [(str(n), {"png": file_of(noise(64, 64, seed=n)), "txt": b"a text"}) for n in range(3)]
    (whole,) = write_shards(folder, "a", samples, 9)
    half = whole.read_bytes()[: len(whole.read_bytes()) // 2]
    (folder / "b.tar").write_bytes(half)
    (folder / "c.tar").write_bytes(b"no tar at all" * 99)
    for kind in ("pairs", "samples"):
        recipe = {"name": kind, "read": {"kind": kind}}
        report = curated(recipe, folder, tmp_path / kind)
        assert report.samples == 4 and report.failed == 1 and "c.tar: read: UserError" in str(report)
        assert report.read["shard: unreadable"] == report.read["shard: damaged at its end"] == 1
