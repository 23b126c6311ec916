"""Continuous batching: one forward pass computes parts of many requests, which are admitted by their need of KV cache.

Prefill chunks, decoded tokens and denoising steps of pictures may share a pass: each row has its own timestep, rotary
id and list of visible cache rows. Every rank of a grid runs the same engine with the same requests in the same order.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megabagel.errors import UserError
from megabagel.inference.cache import PAGE, Arena, KVCache
from megabagel.inference.programs import Event, Program, Session, Special
from megabagel.inference.runner import Result, Runner
from megabagel.inference.segments import Part

R = TypeVar("R")


class RequestTooLarge(UserError):
    """A request that the whole KV cache could not hold."""


class QueueFull(UserError):
    """A request beyond the limit of waiting ones."""


@dataclass(frozen=True)
class Done(Event):
    """End of a request: its result, or the error message if it failed."""

    result: Any = None
    error: str | None = None


@dataclass(eq=False)
class Request:
    """A submitted program (generator) and the session that owns its cache rows."""

    program: Program[Any]
    session: Session
    need: int
    """Most cache rows that the program takes beside those that the session has."""
    ends_session: bool = True
    parts: tuple[Part, ...] | None = None
    """Parts to compute in its next pass; None before it starts."""
    done: Done | None = None
    events: list[Event] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Rows that its next pass takes."""
        return sum(part.layout.tokens for part in self.parts or ())


class Engine:
    """Scheduler of requests over one runner and one KV cache.

    Args:
        runner: runs forward passes and owns the cache.
        special: ids of delimiter tokens.
        most_tokens: limit of rows in one pass; a single larger request still runs, alone.
        most_waiting: limit of the queue; beyond, `submit` refuses.
    """

    def __init__(self, runner: Runner, special: Special, most_tokens: int = 8192, most_waiting: int = 256) -> None:
        self.runner, self.special, self.most_tokens, self.most_waiting = runner, special, most_tokens, most_waiting
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._ended: list[Request] = []
        """Since the last step."""
        self.passes = 0

    @property
    def cache(self) -> KVCache:
        """The pool of all requests."""
        return self.runner.cache

    def session(self) -> Session:
        """An empty session."""
        return Session(Arena(self.cache), self.special)

    def submit(self, program: Program[Any], session: Session, need: int, ends_session: bool = True) -> Request:
        """Queue a program. It starts when the cache has `need` free rows for it.

        The rows are reserved at the start, so a running request never waits for another one to free rows.

        Args:
            program: generator that yields parts and events.
            session: owns the cache rows of the program.
            need: most cache rows that the program takes beside those of the session.
            ends_session: whether the session's rows are freed at the end; False for a dialogue.

        Raises:
            RequestTooLarge: it could never fit.
            QueueFull: too many requests wait already.
        """
        if need > self.cache.rows:
            raise RequestTooLarge(
                f"the request needs {need} tokens of KV cache, the cache has {self.cache.rows}: shorten the prompt, "
                "draw smaller or fewer pictures, lower the token limit, or load the model with more cache_tokens"
            )
        if len(self.waiting) >= self.most_waiting:
            raise QueueFull(f"{len(self.waiting)} requests wait already, the limit is {self.most_waiting}: try later")
        request = Request(program, session, need, ends_session)
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request; its rows are free at once. Nothing happens if it has ended."""
        if request.done is None:
            self._end(request, Done(error="cancelled"))

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not self.running

    def step(self) -> list[tuple[Request, Event]]:
        """Admit requests that fit, run one forward pass, and return the new events, `Done` last of each request."""
        self._admit()
        chosen = self._choose()
        if chosen:
            parts = [part for request in chosen for part in request.parts or ()]
            results = iter(self.runner.run(parts))
            self.passes += 1
            for request in chosen:
                self._advance(request, [next(results) for _ in request.parts or ()])
            self.running = [r for r in self.running if r not in chosen] + [r for r in chosen if r.done is None]
        return self._collected()

    def run(self, program: Program[R], session: Session, need: int = 0, ends_session: bool = True) -> R:
        """Run one program to its end, together with other queued requests, and return its result.

        Args:
            program: generator that yields parts and events.
            session: owns the cache rows of the program.
            need: most cache rows that the program takes beside those of the session.
            ends_session: whether the session's rows are freed at the end.

        Raises:
            UserError: the request was refused or failed.
        """
        request = self.submit(program, session, need, ends_session)
        while request.done is None:
            self.step()
        if request.done.error is not None:
            raise UserError(request.done.error)
        return request.done.result

    def _admit(self) -> None:
        """Start requests in their order as long as the cache has room."""
        while self.waiting:
            request = self.waiting[0]
            missing = request.need - request.session.arena.at_hand
            # Strictly first come, first served: a large request is not overtaken by smaller ones. If nothing runs, no
            # rows will become free, since open sessions hold them; waiting on would block the queue for ever.
            if -(-missing // PAGE) > self.cache.free_pages:
                if not self.running:
                    self.waiting.popleft()
                    self._end(request, Done(error="KV cache: open sessions hold the rows that the request needs"))
                    continue
                return
            self.waiting.popleft()
            request.session.arena.reserve(request.need)
            self.running.append(request)
            self._advance(request, None)
            if request.done is not None and request in self.running:
                self.running.remove(request)

    def _choose(self) -> list[Request]:
        """Requests of the next pass: longest-waiting first, up to `most_tokens` rows; at least one."""
        chosen: list[Request] = []
        total = 0
        for request in self.running:
            if chosen and total + request.tokens > self.most_tokens:
                continue
            chosen.append(request)
            total += request.tokens
        return chosen

    def _advance(self, request: Request, results: list[Result] | None) -> None:
        """Resume a program until its next parts or its end."""
        try:
            found = next(request.program) if results is None else request.program.send(results)
            while isinstance(found, Event):
                request.events.append(found)
                found = request.program.send([])
            request.parts = found
        except StopIteration as end:
            self._end(request, Done(result=end.value))
        except UserError as error:
            self._end(request, Done(error=str(error)))

    def _end(self, request: Request, done: Done) -> None:
        request.program.close()
        request.done = done
        request.events.append(done)
        if request.ends_session:
            request.session.close()
        if request in self.waiting:
            self.waiting.remove(request)
        if done.error is not None and request in self.running:
            self.running.remove(request)
        self._ended.append(request)

    def _collected(self) -> list[tuple[Request, Event]]:
        requests = [*self._ended, *self.running]
        self._ended = []
        found = [(request, event) for request in requests for event in request.events]
        for request in requests:
            request.events.clear()
        return found
