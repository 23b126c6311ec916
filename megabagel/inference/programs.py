"""Programs of requests (prefill, decoding, denoising): generators that yield parts or events and receive results.

The engine runs the parts of many programs in one forward pass. A program is plain sequential code. Closing the
generator cancels the request; its cache rows are freed with its session.

Letters: Q rows with logits, V vocabulary, L latent tokens of a picture, Z numbers of each.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from megabagel.inference.cache import Arena
from megabagel.inference.contexts import Branches, Context, ImageContent, OpLog, TextContent
from megabagel.inference.decoding import TextSettings, choose
from megabagel.inference.runner import Result
from megabagel.inference.segments import Layout, Part, Segment, segment
from megabagel.sampling.guidance import Guidance, branches, guide
from megabagel.sampling.taylorseer import TaylorSeer
from megabagel.sampling.timesteps import euler_step, timestep_grid
from megabagel.sequence.sample import LATENT, TEXT

R = TypeVar("R")

NO_LIMIT = 1 << 30
"""Of tokens in a pass."""


@dataclass(frozen=True)
class Event:
    """Base class of progress reported by a running request."""


@dataclass(frozen=True)
class Token(Event):
    """One decoded token id."""

    id: int
    logits_V: Tensor


@dataclass(frozen=True)
class Step(Event):
    """One denoising step of all pictures of a request; the state before it and what moved it."""

    number: int
    of: int
    t: float
    x_t: tuple[Tensor, ...]
    velocity: tuple[Tensor, ...]
    """After guidance."""
    branches: tuple[dict[str, Tensor], ...]
    """Before guidance, by branch (main, text_free, image_free), as far as evaluated."""


Program = Generator[tuple[Part, ...] | Event, list[Result], R]
"""Yields parts of one forward pass, or an event; is sent the results of its parts (an empty list after an event)."""


@dataclass(frozen=True)
class Special:
    """Ids of the tokens around texts and images."""

    bos: int
    eos: int
    image_start: int
    image_end: int

    @property
    def image(self) -> tuple[int, int]:
        """Both ends of an image."""
        return self.image_start, self.image_end

    def text(self, ids: Sequence[int]) -> TextContent:
        """A text with its delimiters."""
        return TextContent((self.bos, *ids, self.eos))


@dataclass
class Session:
    """The contexts of one request or dialogue and the cache rows under them."""

    arena: Arena
    special: Special
    log: OpLog = field(default_factory=OpLog)
    branches: Branches = field(default_factory=Branches)

    def view(self, context: Context) -> "View":
        """Visible cache rows and rotary id of a query at the end of a context, all of whose ops have run."""
        return View(self.log.rows(context), self.log.position(context))

    def close(self) -> None:
        """Hand all cache rows back."""
        self.arena.close()


@dataclass(frozen=True, eq=False)
class View:
    """Cache rows of a context, and the rotary id of what follows."""

    rows: np.ndarray
    position: int

    def same(self, other: "View") -> bool:
        """Whether queries would get equal results."""
        return self.position == other.position and np.array_equal(self.rows, other.rows)


def prefill(session: Session, contexts: Sequence[Context], most_tokens: int = NO_LIMIT) -> Program[None]:
    """Run all ops of the contexts that have not run yet, any number of ops in a pass of at most `most_tokens`."""
    for part in waiting_parts(session, contexts, most_tokens):
        yield (part,)


def waiting_parts(session: Session, contexts: Sequence[Context], most_tokens: int) -> Iterator[Part]:
    """Parts that run all ops of the contexts that have not run yet, in an order in which they can.

    Args:
        session: of the contexts; the ops get their cache rows.
        contexts: any of the session's.
        most_tokens: of one part, unless a single image has more.
    """
    log = session.log
    group: list[Segment] = []
    images: list[Tensor] = []
    for number in log.waiting(*contexts):
        op = log.ops[number]
        slots = log.slots[number] = session.arena.take(op.content.tokens)
        whole = segment(op.content, log.rows(op.on), slots, log.position(op.on), session.special.image)
        for part in _chunks(whole, most_tokens):
            if group and sum(len(one.slots) for one in group) + len(part.slots) > most_tokens:
                yield Part(Layout(tuple(group)), tuple(images), (0.0,) * len(images))
                group, images = [], []
            group.append(part)
            if isinstance(op.content, ImageContent):
                images.append(op.content.values)
    if group:
        yield Part(Layout(tuple(group)), tuple(images), (0.0,) * len(images))


def _chunks(whole: Segment, most: int) -> list[Segment]:
    """A long text in several segments; an image is never cut, as its tokens see each other."""
    if not whole.causal or len(whole.slots) <= most:
        return [whole]
    cuts = [slice(start, start + most) for start in range(0, len(whole.slots), most)]
    return [
        Segment(
            np.concatenate([whole.past, whole.slots[: cut.start]]),
            whole.slots[cut],
            whole.kind[cut],
            whole.ids[cut],
            whole.position[cut],
            causal=True,
        )
        for cut in cuts
    ]


def decode(
    session: Session, context: Context, settings: TextSettings, most_tokens: int = NO_LIMIT
) -> Program[list[int]]:
    """Decode a text at the end of a context; returns its ids without delimiters. The context stays as it was.

    What is decoded is forgotten with its rows: a text that shall stay is appended to the context and run again.

    Args:
        session: of the context.
        context: ops that have not run yet are run first, the last of them in one pass with bos.
        settings: of the text.
        most_tokens: of one pass of prefill, bos not counted.
    """
    waiting = list(waiting_parts(session, [context], most_tokens))
    for part in waiting[:-1]:
        yield (part,)
    beside = tuple(waiting[-1:])
    view, special = session.view(context), session.special
    own = session.arena.take(settings.max_new_tokens)
    ids: list[int] = []
    last = special.bos
    try:
        for number in range(settings.max_new_tokens):
            step = Segment(
                past=np.concatenate([view.rows, own[:number]]),
                slots=own[number : number + 1],
                kind=np.full(1, TEXT, np.uint8),
                ids=np.array([last]),
                position=np.array([view.position + number]),
                causal=True,
                logits=True,
            )
            result = (yield (*beside, Part(Layout((step,)))))[-1]
            beside = ()
            last = choose(result.logits_QV[0], settings, number)
            yield Token(last, result.logits_QV[0])
            if last == special.eos:
                break
            ids.append(last)
            if settings.stops(ids):
                break
    finally:
        session.arena.give_back(own)
    return ids


@dataclass(frozen=True)
class DrawSettings:
    """How pictures are sampled; names of the released sampler in brackets."""

    points: int = 50
    """[num_timesteps] Points of the timestep grid: `points - 1` evaluations."""
    shift: float = 3.0
    """[timestep_shift]"""
    guidance: Guidance = field(default_factory=Guidance)
    taylorseer: bool = False
    """[enable_taylorseer] Extrapolate most evaluations: faster, not exact."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """One picture to be sampled."""

    rows: int
    cols: int
    """Latent tokens."""
    noise: Tensor
    """[L, Z] fp32 at t = 1."""
    main: View
    text_free: View
    image_free: View

    @property
    def content(self) -> ImageContent:
        """The query: latent tokens between the ends of an image."""
        return ImageContent(LATENT, self.rows, self.cols, None)


def official_noise(seed: int, tokens: int, numbers: int) -> Tensor:
    """Start [tokens, numbers] of a picture as the released code draws it after `torch.manual_seed(seed)`."""
    return torch.randn(tokens, numbers, generator=torch.Generator().manual_seed(seed))


BRANCHES = ("main", "text_free", "image_free")


def denoise(
    session: Session, canvases: Sequence[Canvas], settings: DrawSettings, joint: bool = False
) -> Program[list[Tensor]]:
    """Euler steps from noise to latent tokens [L, Z] of every canvas; all branches of all pictures share passes.

    A branch that would equal another one is not computed: without input images `image_free` is `main`.

    Args:
        session: gives scratch rows; its contexts are not touched.
        canvases: pictures that advance together.
        settings: of all of them.
        joint: take `global` norms over all pictures, as the released code does in a batch.
    """
    grid, how = timestep_grid(settings.points, settings.shift), settings.guidance
    drawings = [_Drawing(session, canvas, settings.taylorseer) for canvas in canvases]
    x = [canvas.noise for canvas in canvases]
    try:
        for number, (now, then) in enumerate(pairwise(grid)):
            scales = how.scales(now)
            parts = [
                drawing.parts(state, float(now), branches(scales)) for drawing, state in zip(drawings, x, strict=True)
            ]
            results = iter((yield tuple(part for group in parts for part in group)))
            found = [d.velocities([next(results) for _ in p]) for d, p in zip(drawings, parts, strict=True)]
            groups = [found] if joint else [[one] for one in found]
            velocity = [v for group in groups for v in _guided(group, scales, how)]
            yield Step(number, len(grid) - 1, float(now), tuple(x), tuple(velocity), tuple(found))
            x = [euler_step(state, v, float(now), float(then)) for state, v in zip(x, velocity, strict=True)]
    finally:
        for drawing in drawings:
            drawing.close()
    return x


def _guided(found: Sequence[dict[str, Tensor]], scales: tuple[float, float], how: Guidance) -> tuple[Tensor, ...]:
    """The guided velocity of every picture of a group with common norms."""
    v, v_text, v_image = (torch.cat([one[name] for one in found]) if name in found[0] else None for name in BRANCHES)
    assert v is not None
    return guide(v, v_text, v_image, scales, how).split([len(one["main"]) for one in found])


class _Drawing:
    """One picture in the making: its scratch rows, and the layout of every set of branches that its steps need."""

    def __init__(self, session: Session, canvas: Canvas, taylorseer: bool) -> None:
        self.session, self.canvas = session, canvas
        self.views = {"main": canvas.main, "text_free": canvas.text_free, "image_free": canvas.image_free}
        self.slots: dict[str, np.ndarray] = {}
        self.layouts: dict[tuple[str, ...], Layout] = {}
        self.seers: dict[str, TaylorSeer] | None = {} if taylorseer else None
        self.evaluations: dict[str, int] = {}
        self.wanted: list[str] = []

    def parts(self, x: Tensor, t: float, needed: tuple[bool, bool]) -> tuple[Part, ...]:
        """Parts to compute at state `x`: one part with all branches, or one per branch under TaylorSeer."""
        self.wanted = ["main", *(name for name, need in zip(BRANCHES[1:], needed, strict=True) if need)]
        distinct = [name for name in self.wanted if self._twin(name) == name]
        if self.seers is None:
            return (Part(self._layout(tuple(distinct)), (x,) * len(distinct), (t,) * len(distinct)),)
        found = []
        for name in distinct:
            number = self.evaluations[name] = self.evaluations.get(name, -1) + 1
            seer = self.seers.setdefault(name, TaylorSeer())
            found.append(Part(self._layout((name,)), (x,), (t,), seer, number))
        return tuple(found)

    def velocities(self, results: Sequence[Result]) -> dict[str, Tensor]:
        """Velocity [L, Z] of every branch that the step needs."""
        distinct = [name for name in self.wanted if self._twin(name) == name]
        of = dict(zip(distinct, (v.cpu() for result in results for v in result.velocities), strict=True))
        return {name: of[self._twin(name)] for name in self.wanted}

    def _twin(self, name: str) -> str:
        """First branch with the same view, whose result can be used for this one."""
        return next(other for other in self.wanted if self.views[other].same(self.views[name]))

    def _layout(self, names: tuple[str, ...]) -> Layout:
        if names not in self.layouts:
            content = self.canvas.content
            for name in names:
                if name not in self.slots:
                    self.slots[name] = self.session.arena.take(content.tokens)
            self.layouts[names] = Layout(tuple(
                segment(content, self.views[n].rows, self.slots[n], self.views[n].position, self.session.special.image)
                for n in names
            ))  # fmt: skip
        return self.layouts[names]

    def close(self) -> None:
        for slots in self.slots.values():
            self.session.arena.give_back(slots)
        self.slots, self.layouts = {}, {}
