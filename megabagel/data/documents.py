"""What a sample is: an ordered list of texts and images, each with the role that it plays in training.

A sample on disk (`samples.py`) may leave roles open; the task of its source decides them here, by `assign_roles`,
before anything is planned. Only sizes are known in this file: numbers of token ids, heights and widths.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Task = Literal["t2i", "i2t", "edit", "video", "text", "interleave"]

TextRole = Literal["condition", "target"]
"""`condition`: read, no loss, may be dropped for classifier-free guidance; `target`: learned with cross-entropy."""

ImageRole = Literal["condition", "target", "look"]
"""`condition`: shown clean (VAE latents and ViT), may be dropped; `target`: generated (noised VAE latents); `look`: ViT
only, never dropped."""


Role = TextRole | ImageRole


class SampleError(Exception):
    """A sample that cannot be used. It is skipped and counted, never fatal.

    `reason` is short and the same for every sample with this fault, so that it can be counted; `detail` says where.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Member:
    """Where bytes lie in a tar or JSONL file: `size` bytes from byte `offset` of shard number `shard`."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Where bytes lie in a parquet file: row `row` of row group `group` in column number `column` of a shard.

    `element` is the place in a cell that holds a list, -1 for the cell itself.
    """

    shard: int
    group: int
    row: int
    column: int
    element: int
    size: int


@dataclass(frozen=True, slots=True)
class Loose:
    """A file of its own, named by a record: `path` is relative to the image folder of the source."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Passage:
    """Text number `part`, counted from 0, of what the record at `place` says."""

    place: Member | Cell
    part: int


Place = Member | Cell | Loose
"""Where the bytes of an image lie."""


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text of `n_ids` token ids (no special tokens), held here or, when it is long, in a shard.

    `alternative` marks another wording of the text before it: a visit reads one of them. `joined` texts belong to a
    chain of edits: the instructions of so many steps, from the image before on, written as one (`expand.py`).
    """

    n_ids: int
    source: str | Member | Passage
    role: TextRole | None = None
    alternative: bool = False
    joined: int = 0
    crc: int | None = field(default=None, compare=False)
    """CRC-32 of the text in UTF-8 when it was indexed."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image of `height` x `width` pixels as a viewer shows it (EXIF orientation applied).

    `frame` marks a further frame of the clip that the image before it belongs to: a visit looks at some of them.
    """

    height: int
    width: int
    member: Place
    role: ImageRole | None = None
    frame: bool = False
    crc: int | None = field(default=None, compare=False)
    """CRC-32 of the file's bytes when it was indexed."""


Item = TextItem | ImageItem


@dataclass(frozen=True, slots=True)
class Document:
    """One sample: `key` names it inside its shard, `items` are in the order in which the model meets them."""

    key: str
    items: tuple[Item, ...]

    @property
    def texts(self) -> list[TextItem]:
        """The texts, in order."""
        return [item for item in self.items if isinstance(item, TextItem)]

    @property
    def images(self) -> list[ImageItem]:
        """The images, in order."""
        return [item for item in self.items if isinstance(item, ImageItem)]


def assign_roles(task: Task, document: Document) -> Document:
    """The document as `task` sees it: every item has a role, and the items are in the order of the task.

    t2i: caption (condition), image (target). i2t: image (look), caption (target), or a conversation as declared, whose
    images are looked at. edit: the first image is a condition, all others are targets; texts are conditions unless
    declared a target. video: texts (condition), then frames (target). text: texts are targets unless declared a
    condition. interleave: roles as declared (docs/bagel.md#tasks). t2i and i2t refuse items that declare another role:
    a question is no caption. Assigning a task twice changes nothing.

    Raises:
        SampleError: the document does not suit the task; the reason starts with the task's name.
    """
    return replace(document, items=_ASSIGN[task](document))


def _text_to_image(document: Document) -> tuple[Item, ...]:
    texts, image = _captions_and_image("t2i", document)
    return *(_text_as("t2i", "condition", text) for text in texts), _image_as("t2i", "target", image)


def _image_to_text(document: Document) -> tuple[Item, ...]:
    if _is_conversation(document):
        return document.items
    texts, image = _captions_and_image("i2t", document)
    return _image_as("i2t", "look", image), *(_text_as("i2t", "target", text) for text in texts)


def _is_conversation(document: Document) -> bool:
    """Whether every item declares a role under which nothing but texts is learned."""
    texts = {text.role for text in document.texts}
    return None not in texts and "target" in texts and all(image.role == "look" for image in document.images)


def _captions_and_image(task: Task, document: Document) -> tuple[list[TextItem], ImageItem]:
    """The wordings of the one caption, and the one image."""
    texts, images = document.texts, document.images
    if sum(not text.alternative for text in texts) != 1 or len(images) != 1:
        raise _unsuitable(task, "not one text and one image", document)
    return texts, images[0]


def _text_as(task: Task, role: TextRole, text: TextItem) -> TextItem:
    """A text in the role that the task gives it, unless it declares another one: a question is no caption."""
    if text.role not in (None, role):
        raise SampleError(f"{task}: a declared role does not suit", f"a text is a {text.role}, wanted as {role}")
    return replace(text, role=role)


def _image_as(task: Task, role: ImageRole, image: ImageItem) -> ImageItem:
    """The same of an image."""
    if image.role not in (None, role):
        raise SampleError(f"{task}: a declared role does not suit", f"an image is a {image.role}, wanted as {role}")
    return replace(image, role=role)


def _edit(document: Document) -> tuple[Item, ...]:
    images = document.images
    if len(images) < 2 or not document.texts:
        raise _unsuitable("edit", "not two images and a text", document)
    first = images[0]

    def role(item: Item) -> Item:
        if isinstance(item, TextItem):
            return replace(item, role=item.role or "condition")
        return replace(item, role="condition" if item is first else "target")

    return tuple(role(item) for item in document.items)


def _video(document: Document) -> tuple[Item, ...]:
    texts, images = document.texts, document.images
    if not texts or not images or list(document.items) != [*texts, *images]:
        raise _unsuitable("video", "not a text followed by frames", document)
    return *(replace(text, role="condition") for text in texts), *(replace(image, role="target") for image in images)


def _text_only(document: Document) -> tuple[Item, ...]:
    if document.images:
        raise _unsuitable("text", "has images", document)
    items = tuple(replace(text, role=text.role or "target") for text in document.texts)
    return _with_target("text", document, items)


def _interleaved(document: Document) -> tuple[Item, ...]:
    if any(item.role is None for item in document.items):
        raise _unsuitable("interleave", "an item has no role", document)
    return _with_target("interleave", document, document.items)


def _with_target(task: Task, document: Document, items: tuple[Item, ...]) -> tuple[Item, ...]:
    if not any(item.role == "target" for item in items):
        raise _unsuitable(task, "no item is a target", document)
    return items


def _unsuitable(task: Task, fault: str, document: Document) -> SampleError:
    return SampleError(f"{task}: {fault}", f"{len(document.texts)} texts, {len(document.images)} images")


_ASSIGN: dict[Task, Callable[[Document], tuple[Item, ...]]] = {
    "t2i": _text_to_image,
    "i2t": _image_to_text,
    "edit": _edit,
    "video": _video,
    "text": _text_only,
    "interleave": _interleaved,
}
