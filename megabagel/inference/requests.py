"""Programs of complete requests: pictures from texts and images, answers, and turns of a dialogue."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megabagel.inference.contexts import ImageContent, add_image, add_system, add_text, add_thought
from megabagel.inference.decoding import TextSettings
from megabagel.inference.engine import Request
from megabagel.inference.presets import Preset
from megabagel.inference.programs import Canvas, DrawSettings, Event, Program, Session, denoise, prefill
from megabagel.inference.programs import decode as decode_text

Item = tuple[int, ...] | tuple[ImageContent, ...]
"""Ids of a text without delimiters, or the views of one image."""

__all__ = ["Drawn", "Item", "Request", "Thought", "answer", "draw", "show", "tokens_of"]


@dataclass(frozen=True)
class Thought(Event):
    """The thought before a picture is complete."""

    ids: tuple[int, ...]


@dataclass(frozen=True)
class Drawn:
    """Pictures of one request as latent tokens."""

    tokens: tuple[Tensor, ...]
    rows: int
    cols: int
    thought: tuple[int, ...] | None


def show(session: Session, items: Sequence[Item], system: tuple[int, ...] | None = None) -> None:
    """Append items to the session's three contexts; nothing runs yet."""
    log, found = session.log, session.branches
    if system is not None:
        found = add_system(log, found, session.special.text(system))
    for item in items:
        if item and isinstance(item[0], ImageContent):
            found = add_image(log, found, *item)  # type: ignore[arg-type]
        else:
            found = add_text(log, found, session.special.text(item))  # type: ignore[arg-type]
    session.branches = found


def tokens_of(items: Sequence[Item]) -> int:
    """Cache rows that items take in one context, at most."""
    return sum(
        sum(view.tokens for view in item if isinstance(view, ImageContent))
        if item and isinstance(item[0], ImageContent)
        else len(item) + 2
        for item in items
    )


def draw(
    session: Session,
    size: tuple[int, int],
    noises: Sequence[Tensor],
    settings: DrawSettings,
    preset: Preset,
    thought: TextSettings | None = None,
    most_tokens: int = 8192,
) -> Program[Drawn]:
    """Pictures after what the session has been shown, one per start noise.

    Args:
        session: its contexts hold the conditions.
        size: rows and columns of latent tokens.
        noises: [L, Z] fp32 at t = 1 of each picture.
        settings: of the sampler.
        preset: whether a thought is a condition of the image-free branch.
        thought: how to decode a thought first; None: none.
        most_tokens: of one pass of prefill.
    """
    ids: tuple[int, ...] | None = None
    if thought is not None:
        ids = tuple((yield from decode_text(session, session.branches.main, thought, most_tokens)))
        yield Thought(ids)
        text = session.special.text(ids)
        session.branches = add_thought(session.log, session.branches, text, preset.thought_in_image_free)
    needed = session.branches
    contexts = [needed.main, needed.text_free]
    if settings.guidance.image_scale > 1:
        contexts.append(needed.image_free)
    yield from prefill(session, contexts, most_tokens)
    main, text_free = session.view(needed.main), session.view(needed.text_free)
    image_free = session.view(needed.image_free) if settings.guidance.image_scale > 1 else main
    canvases = [Canvas(*size, noise, main, text_free, image_free) for noise in noises]
    tokens = yield from denoise(session, canvases, settings)
    return Drawn(tuple(tokens), *size, ids)


def answer(session: Session, settings: TextSettings, most_tokens: int = 8192) -> Program[tuple[int, ...]]:
    """The text that follows what the session has been shown; its ids without delimiters."""
    return tuple((yield from decode_text(session, session.branches.main, settings, most_tokens)))
