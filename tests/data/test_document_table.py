from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from megabagel.data.documents import Cell, Document, ImageItem, Loose, Member, Passage, TextItem
from megabagel.data.index.document_table import Table, TableBuilder, joined

OFFSETS = st.integers(0, 2**50)
SIZES = st.integers(0, 2**40)
COLUMNS = st.integers(0, 2000)
MEMBERS = st.builds(Member, st.just(0), OFFSETS, SIZES)
ROWS = st.builds(Cell, st.just(0), st.integers(0, 2**30), st.integers(0, 2**31), COLUMNS, st.just(-1), SIZES)
CELLS = st.builds(Cell, st.just(0), st.integers(0, 2**30), st.integers(0, 2**31), COLUMNS, st.integers(-1, 9999), SIZES)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
TEXTS = st.builds(
    TextItem,
    st.integers(0, 2**31 - 1),
    NAMES | MEMBERS | st.builds(Passage, MEMBERS | ROWS, st.integers(0, 9999)),
    st.sampled_from([None, "condition", "target"]),
    st.booleans(),
    st.integers(0, 2),
)
SIDES = st.integers(1, 2**31 - 1)
IMAGES = st.builds(
    ImageItem,
    SIDES,
    SIDES,
    MEMBERS | CELLS | st.builds(Loose, NAMES, SIZES),
    st.sampled_from([None, "condition", "target", "look"]),
    st.booleans(),
)
DOCUMENTS = st.lists(st.builds(Document, NAMES, st.lists(TEXTS | IMAGES, max_size=5).map(tuple)), max_size=4)


def table(documents: list[Document]) -> Table:
    builder = TableBuilder()
    for document in documents:
        builder.add(document.key, document.items, range(len(document.items)))
    return builder.table()


@given(DOCUMENTS)
def test_documents_come_back(documents: list[Document]) -> None:
    made = table(documents)
    assert [made.document(number) for number in range(len(made))] == documents
    assert made.items["crc"].tolist() == [n for document in documents for n in range(len(document.items))]


def test_tables_are_joined_by_the_numbers_of_their_shards() -> None:
    """Texts and paths move behind those of earlier shards, everything else stays and gets its shard's number."""

    def documents(shard: int) -> list[Document]:
        return [
            Document(f"{shard}-{n}", items)
            for n, items in enumerate(
                [
                    (TextItem(3, f"words of {shard}"), ImageItem(4, 5, Member(shard, 6, 7))),
                    (TextItem(3, Passage(Cell(shard, 1, 2, 3, -1, 4), 0)), ImageItem(1, 2, Cell(shard, 9, 8, 7, 6, 5))),
                    (ImageItem(1, 2, Loose(f"{shard}/ä.png", 3)), TextItem(8, Member(shard, 0, 9)), TextItem(1, "é")),
                ][: shard + 1]
            )
        ]

    own = [
        [Document(d.key, tuple(_in_shard(item, 0) for item in d.items)) for d in documents(shard)] for shard in range(3)
    ]
    joint = joined([table(own[0]), table([]), table(own[1]), table(own[2])])
    places = {0: 0, 1: 2, 2: 3}
    expected = [
        Document(d.key, tuple(_in_shard(item, places[shard]) for item in d.items))
        for shard in range(3)
        for d in documents(shard)
    ]
    assert [joint.document(number) for number in range(len(joint))] == expected


def _in_shard(item: TextItem | ImageItem, shard: int) -> TextItem | ImageItem:
    """The item with another number of its shard."""
    if isinstance(item, ImageItem):
        return item if isinstance(item.member, Loose) else replace(item, member=replace(item.member, shard=shard))
    match item.source:
        case str():
            return item
        case Passage(place, _):
            return replace(item, source=replace(item.source, place=replace(place, shard=shard)))
        case member:
            return replace(item, source=replace(member, shard=shard))
