"""The engine's side of the server: runs jobs of many clients on one model, in the main thread.

The main thread, because the model lives there: on a CPU megatron-core runs under a torch-function mode that belongs to
one thread (`runtime.cpu_backend`), heartbeats report where that thread is, and signals reach it.

On a grid this loop runs on every rank. Rank 0 sends what its clients asked for to the others before each forward pass,
as JSON, so that every rank submits, cancels and steps in the same order. An idle grid does so every `_TICK_S` seconds,
since ranks that wait longer than `run.timeout` count as hung.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

from megabagel.errors import UserError
from megabagel.inference.api import Done, Pipeline, Step, Token
from megabagel.inference.contexts import ImageContent, TextContent
from megabagel.inference.engine import Event as EngineEvent
from megabagel.inference.engine import Request
from megabagel.runtime import objects
from megabagel.runtime.phase import phase
from megabagel.sampling.timesteps import euler_step
from megabagel.sequence.sample import LATENT
from megabagel.serve.errors import ApiError, of_user_error, stopping
from megabagel.serve.events import Accepted, Event, Failed, Finished, Preview, TokenId
from megabagel.serve.jobs import Job, Upload, from_wire, to_wire

logger = logging.getLogger(__name__)

_TICK_S = 5.0
"""Longest wait for a request."""

Notify = Callable[[Event], None]
"""Takes the events of one job, in the engine's thread: it must neither block nor raise."""

Command = tuple[str, int, Any]
"""(submit, number, job), (cancel, number, None), (wake, 0, None) or (end, 0, None)."""


@dataclass(eq=False)
class _Live:
    """A job that the engine works on."""

    number: int
    job: Job
    request: Request
    tokens: int = 0
    """Decoded so far."""


class Worker:
    """Runs jobs on a model.

    Args:
        model: this rank's.
        rank: of this process.
        ranks: number of processes; each runs `run`.
    """

    def __init__(self, model: Pipeline, rank: int = 0, ranks: int = 1) -> None:
        self.model, self.engine = model, model.engine
        self._first, self._ranks = rank == 0, ranks
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._numbers = count(1)
        self._live: dict[Request, _Live] = {}
        self._notify: dict[int, Notify] = {}
        self._lock = threading.Lock()
        self._closed: ApiError | None = None
        self._end_at: float | None = None

    def submit(self, job: Job, notify: Notify) -> int:
        """Queue a job, from any thread; returns its number. The first event is Accepted or Failed."""
        with self._lock:
            number = next(self._numbers)
            if self._closed is None:
                self._notify[number] = notify
                self._inbox.put(("submit", number, job))
                return number
        notify(Failed(self._closed))
        return number

    def cancel(self, number: int) -> None:
        """End a job, from any thread. Nothing happens if it has ended."""
        self._inbox.put(("cancel", number, None))

    def drain(self, seconds: float) -> None:
        """End the loop when all jobs are done, or after `seconds`; may be called by a signal handler."""
        self._end_at = time.monotonic() + seconds
        self._inbox.put(("wake", 0, None))

    @property
    def state(self) -> str:
        """`ready`, `draining` or `stopped`."""
        if self._closed is not None:
            return "stopped"
        return "ready" if self._end_at is None else "draining"

    def run(self) -> None:
        """Serve until `drain`. On every rank; raises what ends the engine, such as the loss of a rank."""
        reason = ApiError(503, "the model has stopped; the server ends", "engine_stopped")
        try:
            while self._turn():
                pass
            reason = stopping()
        finally:
            self._close(reason)

    def _turn(self) -> bool:
        """Take new commands, then run one forward pass; returns whether to go on."""
        with phase("serve"):
            for kind, number, job in self._exchanged(self._collected() if self._first else []):
                if kind == "submit":
                    self._start(number, job)
                elif kind == "cancel":
                    self._cancel(number)
                elif kind == "end":
                    return False
            if not self.engine.idle:
                self._step()
        return True

    def _collected(self) -> list[Command]:
        """Commands of rank 0's clients; waits for one while there is nothing to do."""
        found: list[Command] = []
        try:
            if self.engine.idle and self._end_at is None:
                found.append(self._inbox.get(timeout=_TICK_S))
            while True:
                found.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        found = [command for command in found if command[0] != "wake"]
        over = self._end_at is not None and (time.monotonic() > self._end_at or (not found and self.engine.idle))
        return [*found, ("end", 0, None)] if over else found

    def _exchanged(self, commands: list[Command]) -> list[Command]:
        """Rank 0's commands on every rank."""
        if self._ranks == 1:
            return commands
        wires = [(kind, number, job and to_wire(job)) for kind, number, job in commands]
        told = objects.broadcast(wires)
        if self._first:
            return commands
        return [(kind, number, wire and from_wire(wire)) for kind, number, wire in told]

    def _start(self, number: int, job: Job) -> None:
        """Hand a job to the engine."""
        items = [item.image if isinstance(item, Upload) else item for item in job.items]
        try:
            if job.draws:
                request = self.model.submit_draw(items, **job.options)
            else:
                request = self.model.submit_answer(items, **job.options)
        except UserError as error:
            self._tell(number, Failed(of_user_error(error)))
            return
        except Exception as error:
            self._survive(error)
            self._tell(number, Failed(_bug()))
            return
        self._live[request] = _Live(number, job, request)
        log, main = request.session.log, request.session.branches.main
        contents = [log.ops[op].content for op in main]
        text = sum(content.tokens for content in contents if isinstance(content, TextContent))
        image = sum(content.tokens for content in contents if isinstance(content, ImageContent))
        self._tell(number, Accepted(text, image))

    def _cancel(self, number: int) -> None:
        for request, live in list(self._live.items()):
            if live.number == number:
                self.engine.cancel(request)
                del self._live[request]
        self._notify.pop(number, None)

    def _step(self) -> None:
        try:
            found = self.engine.step()
        except Exception as error:
            self._survive(error)
            for request, live in list(self._live.items()):
                self._cancel_broken(request)
                self._tell(live.number, Failed(_bug()))
            self._live.clear()
            return
        for request, event in found:
            if request in self._live:
                self._report(self._live[request], event)

    def _survive(self, error: Exception) -> None:
        """Log a bug that a request has met. On a grid it is raised: other ranks may not have met it."""
        if self._ranks > 1:
            raise error
        logger.error("a forward pass failed; its requests end, the server goes on", exc_info=error)

    def _cancel_broken(self, request: Request) -> None:
        try:
            self.engine.cancel(request)
        except Exception as error:
            logger.error("a failed request could not be closed", exc_info=error)

    def _report(self, live: _Live, event: EngineEvent) -> None:
        """Translate an event of the engine."""
        if isinstance(event, Token):
            live.tokens += 1
            self._tell(live.number, TokenId(event.id))
        elif isinstance(event, Step):
            self._preview(live, event)
        elif isinstance(event, Done):
            del self._live[live.request]
            if event.error is not None:
                self._tell(live.number, Failed(ApiError(400, event.error, "request_failed")))
            else:
                self._tell(live.number, Finished(event.result, live.tokens + _picture_tokens(self.model, event.result)))

    def _preview(self, live: _Live, step: Step) -> None:
        """Decode the estimate x - t v of the finished picture, at as many steps as the client wants to see."""
        pieces = live.job.previews + 1  # the last one ends in the picture itself
        due = (step.number + 1) * pieces // step.of > step.number * pieces // step.of
        if not due or step.number + 1 == step.of or not self._first:
            return
        rows, cols = _grid(self.model, live)
        estimate = euler_step(step.x_t[0], step.velocity[0], step.t, 0.0)
        self._tell(live.number, Preview(step.number, step.of, self.model.pixels(estimate, rows, cols)))

    def _tell(self, number: int, event: Event) -> None:
        ended = isinstance(event, Finished | Failed)
        notify = self._notify.pop(number, None) if ended else self._notify.get(number)
        if notify is not None:
            notify(event)

    def _close(self, reason: ApiError) -> None:
        """Answer all jobs that are left, and every later one, with `reason`."""
        with self._lock:
            self._closed = reason
        for notify in self._notify.values():
            notify(Failed(reason))
        self._notify.clear()


def _grid(model: Pipeline, live: _Live) -> tuple[int, int]:
    """Rows and columns of the latent tokens of a job's pictures."""
    log = live.request.session.log
    shown = [op.content for op in log.ops if isinstance(op.content, ImageContent) and op.content.kind == LATENT]
    return model.grid(live.job.options.get("size"), (shown[-1].rows, shown[-1].cols) if shown else None)


def _picture_tokens(model: Pipeline, result: Any) -> int:
    """Latent tokens of pictures; none for an answer."""
    if not isinstance(result, list):
        return 0
    area = model.config.model.latent_stride**2
    return sum(picture.pixels.shape[0] * picture.pixels.shape[1] // area for picture in result)


def _bug() -> ApiError:
    return ApiError(500, "the request met a bug of the server; its log has the traceback", "internal_error")
