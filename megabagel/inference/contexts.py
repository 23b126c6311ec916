"""Contexts as plain data: ops appended to sequences, and which of them each branch of guidance sees.

A context is the tuple of its op numbers, in order. An op holds a text or an image that was appended to one context;
contexts that begin alike share their ops and so the cache rows of them.

Every picture is guided by three contexts: `main` has all conditions, `text_free` lacks the last text, `image_free`
lacks all images. Each counts rotary positions for itself, so `image_free` has no gap where images were.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megabagel.sequence.items import DELIMITERS
from megabagel.sequence.sample import LATENT, VIT

Context = tuple[int, ...]
"""Numbers of ops in an `OpLog`."""


@dataclass(frozen=True, eq=False)
class TextContent:
    """Token ids of a text with its delimiters; bos, ids, eos."""

    ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens in the sequence."""
        return len(self.ids)

    @property
    def advance(self) -> int:
        """How far the rotary counter moves."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class ImageContent:
    """An image as ViT patches or as clean latent tokens; start- and end-of-image are added to it."""

    kind: int
    """VIT or LATENT of `sequence.sample`."""
    rows: int
    cols: int
    values: Any
    """Patches [rows * cols, 3 p p] or latent tokens [rows * cols, Z], row by row."""

    def __post_init__(self) -> None:
        assert self.kind in (VIT, LATENT)
        assert self.values is None or len(self.values) == self.rows * self.cols

    @property
    def tokens(self) -> int:
        """Tokens in the sequence."""
        return self.rows * self.cols + DELIMITERS

    @property
    def advance(self) -> int:
        """All tokens of an image have one rotary id."""
        return 1


Content = TextContent | ImageContent


@dataclass(frozen=True, eq=False)
class Op:
    """A content appended to a context."""

    on: Context
    content: Content


@dataclass
class OpLog:
    """All ops of one request or session, and where their cache rows lie."""

    ops: list[Op] = field(default_factory=list)
    slots: list[np.ndarray | None] = field(default_factory=list)
    """Per op: cache rows [tokens] in order; None until it has run."""

    def append(self, context: Context, content: Content) -> Context:
        """The context with `content` at its end. Equal appends are one op, however many branches ask for them."""
        for number, op in enumerate(self.ops):
            if op.content is content and op.on == context:
                return (*context, number)
        self.ops.append(Op(context, content))
        self.slots.append(None)
        return (*context, len(self.ops) - 1)

    def position(self, context: Context) -> int:
        """The next rotary id."""
        return sum(self.ops[number].content.advance for number in context)

    def tokens(self, context: Context) -> int:
        """Cache rows of a context."""
        return sum(self.ops[number].content.tokens for number in context)

    def rows(self, context: Context) -> np.ndarray:
        """Cache rows of a context whose ops have all been given theirs, in sequence order (int64)."""
        found = [self.slots[number] for number in context]
        assert all(slots is not None for slots in found), "ops of the context have no rows yet"
        return np.concatenate([np.zeros(0, np.int64), *(slots for slots in found if slots is not None)])

    def waiting(self, *contexts: Context) -> list[int]:
        """Ops of the contexts that have not run yet, in an order in which they can."""
        return sorted({number for context in contexts for number in context if self.slots[number] is None})


@dataclass(frozen=True)
class Branches:
    """The three contexts of a picture."""

    main: Context = ()
    text_free: Context = ()
    image_free: Context = ()


def add_system(log: OpLog, branches: Branches, text: TextContent) -> Branches:
    """A system prompt: no condition, so text guidance is measured against a context without it."""
    return replace(branches, main=log.append(branches.main, text), image_free=log.append(branches.image_free, text))


def add_text(log: OpLog, branches: Branches, text: TextContent) -> Branches:
    """A text; `text_free` becomes what was there before it, earlier texts included."""
    return Branches(
        main=log.append(branches.main, text),
        text_free=branches.main,
        image_free=log.append(branches.image_free, text),
    )


def add_image(log: OpLog, branches: Branches, *views: ImageContent) -> Branches:
    """An image in one or several views (latents, then ViT patches)."""
    main = branches.main
    for view in views:
        main = log.append(main, view)
    return Branches(main, main, branches.image_free)


def add_thought(log: OpLog, branches: Branches, text: TextContent, image_free: bool = False) -> Branches:
    """Append the model's reasoning about a picture as a condition.

    Args:
        log: ops of the session.
        branches: contexts before it.
        text: the decoded reasoning with its delimiters.
        image_free: whether `image_free` gets it as well; by default only `main` does.
    """
    free = log.append(branches.image_free, text) if image_free else branches.image_free
    return replace(branches, main=log.append(branches.main, text), image_free=free)
