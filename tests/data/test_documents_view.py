"""Documents of a task: made on demand, told apart by a fingerprint that knows appended samples."""

from pathlib import Path

import pytest

from megabagel.data.documents import Document, ImageItem, Item, Member, Task, TextItem, assign_roles
from megabagel.data.formats.shards import write_shards
from megabagel.data.index.document_table import Table, TableBuilder, joined
from megabagel.data.index.documents_view import Documents, known_samples, usable, what_changed
from megabagel.data.index.index import build_index
from tests.data.test_index import BYTES, captioned
from tests.data.test_index_cache import Characters


def table(*documents: tuple[Item, ...]) -> Table:
    builder = TableBuilder()
    for number, items in enumerate(documents):
        builder.add(f"d{number}", items, [1] * len(items))
    return joined([builder.table()])


PAIR: tuple[Item, ...] = (TextItem(3, "abc"), ImageItem(4, 5, Member(0, 0, 1)))
MIXED = table(
    PAIR,
    (TextItem(2, "no"),),
    PAIR[::-1],
    (PAIR[1], TextItem(4, "blue"), ImageItem(6, 7, Member(0, 3, 1), "look")),
    (TextItem(3, "abc"), TextItem(2, "de", None, True), PAIR[1]),
    (TextItem(3, "abc"), TextItem(2, "de"), PAIR[1]),
    (TextItem(1, "a", "condition"), ImageItem(4, 5, Member(0, 0, 1), "look"), TextItem(2, "so", "target")),
)


@pytest.mark.parametrize(
    ("task", "numbers"), [("t2i", [0, 2, 4]), ("i2t", [0, 2, 4, 6]), ("text", [1]), ("edit", [3]), ("video", [0, 4, 5])]
)
def test_documents_are_those_of_the_task(task: Task, numbers: list[int]) -> None:
    """Several arrangements of items, with roles as `assign_roles` gives them."""
    chosen, unusable = usable(MIXED, task)
    assert chosen.tolist() == numbers
    assert sorted([*numbers, *(number for number, _ in unusable)]) == list(range(7))
    documents = Documents(MIXED, chosen, task, "bytes")
    expected = [assign_roles(task, MIXED.document(number)) for number in numbers]
    assert list(documents) == expected
    assert [documents[place] for place in range(len(numbers))] == expected
    assert (documents[-1], documents[:2], documents[::-1]) == (expected[-1], tuple(expected[:2]), tuple(expected[::-1]))
    assert documents == tuple(expected) and tuple(expected) == documents
    assert documents != expected[1:]
    with pytest.raises(IndexError):
        documents[len(numbers)]


def test_many_documents_are_made_one_by_one() -> None:
    """1e5 samples: the whole is numbers, a document exists while it is used."""
    count = 100_000
    many = table(*[(TextItem(n, "abc"), ImageItem(4, 5 + n, Member(0, n, 1))) for n in range(count)])
    numbers, unusable = usable(many, "t2i")
    documents = Documents(many, numbers, "t2i", "bytes")
    assert len(documents) == count and not unusable
    for place in (0, 77_777, count - 1):
        items = (TextItem(place, "abc", "condition"), ImageItem(4, 5 + place, Member(0, place, 1), "target"))
        assert documents[place] == Document(f"d{place}", items)


def documents(folder: Path, first: int, count: int, task: Task = "t2i", per_shard: int = 2) -> Documents:
    folder.mkdir()
    found = build_index(write_shards(folder, "s", captioned(count, first), per_shard), BYTES, task).documents
    assert isinstance(found, Documents)
    return found


def test_appended_samples_keep_the_numbers_of_old_ones(tmp_path: Path) -> None:
    old, more = documents(tmp_path / "a", 0, 4), documents(tmp_path / "b", 0, 7, per_shard=4)
    assert known_samples(more, old.fingerprint()) == 4
    assert [document.key for document in more[:4]] == [document.key for document in old]
    assert what_changed(more, old.fingerprint()) == "3 samples were appended to 4, which are the same"
    assert known_samples(old, old.fingerprint()) == 4
    assert known_samples(old, more.fingerprint()) is None
    assert what_changed(old, more.fingerprint()) == "7 samples, now 4"


def test_other_changes_are_refused_and_named(tmp_path: Path) -> None:
    mine = documents(tmp_path / "a", 0, 4)
    others = {
        documents(tmp_path / "b", 1, 4).fingerprint(): "4 samples as before, but of other contents or order",
        documents(tmp_path / "c", 1, 3).fingerprint(): "3 samples, now 4",
        documents(tmp_path / "d", 0, 4, "i2t").fingerprint(): "task 'i2t', now 't2i'",
        Documents(mine.table, mine.numbers, "t2i", Characters().fingerprint()).fingerprint(): "another tokenizer",
        "0123abcd": "indexed by another version of the program",
    }
    assert len(others) == 5
    for fingerprint, change in others.items():
        assert known_samples(mine, fingerprint) is None
        assert what_changed(mine, fingerprint) == change


def test_every_part_of_a_sample_counts() -> None:
    def fingerprint(key: str = "d", *, crc: int = 1, items: tuple[Item, ...] = PAIR) -> str:
        builder = TableBuilder()
        builder.add(key, items, [1, crc])
        made = joined([builder.table()])
        return Documents(made, usable(made, "t2i")[0], "t2i", "bytes").fingerprint()

    text, image = PAIR
    elsewhere = (TextItem(3, Member(0, 9, 9)), ImageItem(4, 5, Member(0, 8, 8)))
    assert fingerprint(items=elsewhere) == fingerprint()  # where it lies does not count
    others = [
        fingerprint("e"),
        fingerprint(crc=2),
        fingerprint(items=(TextItem(4, "abc"), image)),
        fingerprint(items=(text, ImageItem(5, 5, Member(0, 0, 1)))),
        fingerprint(items=(text, ImageItem(4, 4, Member(0, 0, 1)))),
        fingerprint(items=PAIR[::-1]),
        fingerprint(items=(TextItem(3, "abc", "condition"), image)),
    ]
    assert len({fingerprint(), *others}) == 8
