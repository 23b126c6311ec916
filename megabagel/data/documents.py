"""Documents: the description of one sample as an ordered list of texts and images with their roles, without content.

A document holds sizes (token counts, pixel heights and widths) and the places where the bytes lie, so that steps can be
planned and packed without reading a shard. A sample on disk (`formats/samples.py`) may leave roles undeclared;
`assign_roles` completes them from the task of its source before planning.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

Task = Literal["t2i", "i2t", "edit", "video", "text", "interleave", "reward", "reconstruct"]

TextRole = Literal["condition", "target", "reward"]
"""`condition`: no loss, may be dropped for classifier-free guidance; `target`: trained with cross-entropy; `reward`: no
tokens, the scores of the image before it as `rewards.Reward.to_json` writes them."""

ImageRole = Literal["condition", "target", "look", "constraint"]
"""`condition`: clean VAE latents and ViT tokens, may be dropped; `target`: noised VAE latents with flow loss; `look`:
ViT tokens only, never dropped (image understanding); `constraint`: no tokens, its latents are the second flow target of
the image before it (SRUM equation 2)."""


Role = TextRole | ImageRole


class SampleError(Exception):
    """Raised for a sample that cannot be used. Callers skip and count the sample; the run continues.

    Args:
        reason: short, and identical for all samples with the same fault: skipped samples are counted by it.
        detail: the field, value or position at fault; not part of the counts.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Member:
    """Location of bytes in a tar or JSONL file: `size` bytes from byte `offset` of shard number `shard`."""

    shard: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Cell:
    """Location of bytes in a parquet file: row `row` of row group `group` in column number `column` of a shard.

    `element` is the index into a cell that holds a list; -1 addresses the whole cell.
    """

    shard: int
    group: int
    row: int
    column: int
    element: int
    size: int


@dataclass(frozen=True, slots=True)
class Loose:
    """Location of an image in a file of its own; `path` is relative to the image folder of the source."""

    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Passage:
    """Location of a text inside a record: the record at `place`, and the number of the text in it, from 0."""

    place: Member | Cell
    part: int


Place = Member | Cell | Loose
"""Location of the bytes of an image."""


@dataclass(frozen=True, slots=True)
class TextItem:
    """A text of `n_ids` token ids (special tokens not counted).

    `source` is the text itself if it is short, else its location in a shard. `alternative` marks another wording of the
    preceding text: each visit (one use of a sample in one epoch) reads one of the wordings. `joined` is nonzero for
    texts of a chain of edits that merge the instructions of that many steps, starting at the preceding image
    (`plan/augmentation.py`).
    """

    n_ids: int
    source: str | Member | Passage
    role: TextRole | None = None
    alternative: bool = False
    joined: int = 0
    # Not compared: two items are equal if they describe the same text, whether or not a checksum was recorded.
    crc: int | None = field(default=None, compare=False)
    """CRC-32 of the UTF-8 text at indexing time."""


@dataclass(frozen=True, slots=True)
class ImageItem:
    """An image of `height` x `width` pixels after its EXIF orientation is applied.

    `frame` marks a further frame of the clip that the preceding image belongs to. A clip with role `look` shows a
    random subset of its frames in each visit.
    """

    height: int
    width: int
    member: Place
    role: ImageRole | None = None
    frame: bool = False
    crc: int | None = field(default=None, compare=False)
    """CRC-32 of the file's bytes at indexing time."""


Item = TextItem | ImageItem


@dataclass(frozen=True, slots=True)
class Document:
    """One sample: `key` identifies it within its shard, `items` are in sequence order."""

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
    """Give every item of a document its role under `task`, and order the items as the task requires.

    t2i: caption (condition), image (target). i2t: image (look), caption (target); a conversation keeps its declared
    roles. reconstruct: image (look), text (condition), the same image (target). reward: as t2i, with the scores of the
    image and maybe a second target. edit: the first image is a condition, all others are targets; texts are conditions
    unless declared a target. video: texts (condition), then frames (target). text: texts are targets unless declared a
    condition. interleave: roles as declared (docs/bagel.md#tasks). Tasks other than reward leave out scores and second
    targets: with t2i a source of judged pictures is plain fine-tuning on them. Idempotent.

    Raises:
        SampleError: the document does not suit the task; the reason starts with the name of the task.
    """
    if task != "reward":
        document = replace(document, items=tuple(item for item in document.items if item.role not in ANNOTATIONS))
    return replace(document, items=_ASSIGN[task](document))


ANNOTATIONS = ("reward", "constraint")
"""Roles of items without tokens."""


def _rewarded(document: Document) -> tuple[Item, ...]:
    plain = tuple(item for item in document.items if item.role not in ANNOTATIONS)
    notes = tuple(item for item in document.items if item.role in ANNOTATIONS)
    if not any(note.role == "reward" for note in notes):
        raise _unsuitable("reward", "no scores", document)
    texts, image = _captions_and_image("reward", replace(document, items=plain))
    return *(_text_as("reward", "condition", text) for text in texts), _image_as("reward", "target", image), *notes


def _text_to_image(document: Document) -> tuple[Item, ...]:
    texts, image = _captions_and_image("t2i", document)
    return *(_text_as("t2i", "condition", text) for text in texts), _image_as("t2i", "target", image)


def _image_to_text(document: Document) -> tuple[Item, ...]:
    if _is_conversation(document):
        return document.items
    texts, image = _captions_and_image("i2t", document)
    return _image_as("i2t", "look", image), *(_text_as("i2t", "target", text) for text in texts)


def _reconstructed(document: Document) -> tuple[Item, ...]:
    """Reconstruction alignment (RecA, https://arxiv.org/abs/2509.07295): what the ViT sees of an image, drawn again."""
    if [image.role for image in document.images] == ["look", "target"]:
        return document.items  # assigned already
    texts, image = _captions_and_image("reconstruct", document)
    prompt = (_text_as("reconstruct", "condition", text) for text in texts)
    return _image_as("reconstruct", "look", image), *prompt, _image_as("reconstruct", "target", image)


def _is_conversation(document: Document) -> bool:
    """Return whether all items declare roles, some text is a target and every image is only looked at."""
    texts = {text.role for text in document.texts}
    return None not in texts and "target" in texts and all(image.role == "look" for image in document.images)


def _captions_and_image(task: Task, document: Document) -> tuple[list[TextItem], ImageItem]:
    """The wordings of the only caption, and the only image."""
    texts, images = document.texts, document.images
    # Alternatives are wordings of the same caption and don't count as further texts.
    if sum(not text.alternative for text in texts) != 1 or len(images) != 1:
        raise _unsuitable(task, "not one text and one image", document)
    return texts, images[0]


def _text_as(task: Task, role: TextRole, text: TextItem) -> TextItem:
    """A text in the role that the task gives it; SampleError if it declares another one."""
    # Overriding the declared role instead would train on a question as if it were a caption.
    if text.role not in (None, role):
        raise SampleError(f"{task}: a declared role does not suit", f"a text is a {text.role}, wanted as {role}")
    return replace(text, role=role)


def _image_as(task: Task, role: ImageRole, image: ImageItem) -> ImageItem:
    """An image in the role that the task gives it; SampleError if it declares another one."""
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
    "reward": _rewarded,
    "reconstruct": _reconstructed,
}
