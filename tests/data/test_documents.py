import pytest

from megabagel.data.documents import Document, ImageItem, Member, SampleError, TextItem, assign_roles

HERE = Member(0, 0, 1)


def text(name: str, role: str | None = None) -> TextItem:
    return TextItem(3, name, role)


def image(height: int, role: str | None = None) -> ImageItem:
    return ImageItem(height, 8, HERE, role)


def roles(document: Document) -> list[tuple[str | int, str | None]]:
    """(text or height, role) per item."""
    return [(item.source if isinstance(item, TextItem) else item.height, item.role) for item in document.items]


CASES = {
    "t2i": ([text("a"), image(1)], [("a", "condition"), (1, "target")]),
    "t2i turns the order": ([image(1), text("a")], [("a", "condition"), (1, "target")]),
    "i2t": ([text("a"), image(1)], [(1, "look"), ("a", "target")]),
    "edit": (
        [image(1), text("a"), image(2), text("b"), text("c", "target"), image(3)],
        [(1, "condition"), ("a", "condition"), (2, "target"), ("b", "condition"), ("c", "target"), (3, "target")],
    ),
    "edit overrules image roles": (
        [text("a"), image(1, "target"), image(1, "condition")],
        [("a", "condition"), (1, "condition"), (1, "target")],
    ),
    "video": (
        [text("a", "target"), text("b"), image(1), image(2), image(3)],
        [("a", "condition"), ("b", "condition"), (1, "target"), (2, "target"), (3, "target")],
    ),
    "text": ([text("a"), text("b")], [("a", "target"), ("b", "target")]),
    "text keeps a declared condition": (
        [text("a", "condition"), text("b")],
        [("a", "condition"), ("b", "target")],
    ),
    "interleave": (
        [image(1, "look"), text("a", "condition"), image(2, "target"), text("b", "target")],
        [(1, "look"), ("a", "condition"), (2, "target"), ("b", "target")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_roles_follow_the_task(case: str) -> None:
    items, expected = CASES[case]
    task = case.split()[0]
    assigned = assign_roles(task, Document("k", tuple(items)))
    assert roles(assigned) == expected
    assert assigned.key == "k"
    assert assign_roles(task, assigned) == assigned


UNSUITABLE = {
    "t2i: not one text and one image": [[text("a")], [image(1)], [text("a"), image(1), image(2)]],
    "i2t: not one text and one image": [[image(1)], [text("a"), text("b"), image(1)]],
    "edit: not two images and a text": [[image(1), text("a")], [image(1), image(2)]],
    "video: not a text followed by frames": [[image(1)], [text("a")], [image(1), text("a")]],
    "text: has images": [[text("a"), image(1)]],
    "text: no item is a target": [[text("a", "condition")]],
    "interleave: an item has no role": [[text("a"), image(1, "target")]],
    "interleave: no item is a target": [[text("a", "condition"), image(1, "look")]],
}


@pytest.mark.parametrize("reason", UNSUITABLE)
def test_an_unsuitable_document_says_why(reason: str) -> None:
    for items in UNSUITABLE[reason]:
        with pytest.raises(SampleError) as caught:
            assign_roles(reason.split(":")[0], Document("k", tuple(items)))
        assert caught.value.reason == reason
        assert f"{sum(isinstance(item, ImageItem) for item in items)} images" in caught.value.detail
