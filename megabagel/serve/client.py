"""A client's request on the event loop: its body, its events, and what happens when the client leaves."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from megabagel.serve.errors import ApiError
from megabagel.serve.events import Accepted, Event, Failed, Finished, Preview, TokenId
from megabagel.serve.jobs import Job
from megabagel.serve.limits import Limits
from megabagel.serve.metrics import Metrics
from megabagel.serve.parse import Parsed
from megabagel.serve.uploads import open_uploads
from megabagel.serve.worker import Worker

T = TypeVar("T")

CLIENT_LEFT = 499
"""Status of a request whose client has left, as nginx counts it; nobody receives it."""


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises ApiError if it is too large or too slow."""
    too_large = ApiError(413, f"the body is too large: expected at most {limits.body:,} bytes", "request_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.body:
        raise too_large
    try:
        return await asyncio.wait_for(_chunks(request, limits.body, too_large), limits.seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body took more than {limits.seconds:g} s", "request_timeout") from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_LEFT, "the client has left") from error


async def _chunks(request: Request, most: int, too_large: ApiError) -> bytes:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


class Ticket:
    """A job under way; leaving the `async with` before its end cancels it.

    Args:
        worker: runs it.
        job: what to make.
        metrics: count its tokens and pictures.
        path: of the request, for the metrics.
    """

    def __init__(self, worker: Worker, job: Job, metrics: Metrics, path: str) -> None:
        self._worker, self._metrics, self._path, self._job = worker, metrics, path, job
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._ended = self._began = False
        self._since = time.monotonic()
        loop = asyncio.get_running_loop()

        def notify(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self._number = worker.submit(job, notify)

    async def __aenter__(self) -> "Ticket":
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._ended:
            self._worker.cancel(self._number)

    async def accepted(self) -> Accepted:
        """Wait until the engine has queued the job. Raises ApiError if it refuses."""
        event = await self._next()
        assert isinstance(event, Accepted)
        self._metrics.totals["prompt_tokens"] += event.text_tokens + event.image_tokens
        return event

    async def events(self) -> AsyncIterator[TokenId | Preview | Finished]:
        """Yield the events after `accepted`, `Finished` last. Raises ApiError if the job fails."""
        while True:
            event = await self._next()
            if not self._began:
                self._began = True
                self._metrics.began(self._path, time.monotonic() - self._since)
            assert not isinstance(event, Accepted | Failed)
            yield event
            if isinstance(event, Finished):
                return

    async def _next(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Failed):
            self._ended = True
            raise event.error
        if isinstance(event, TokenId):
            self._metrics.totals["generated_tokens"] += 1
        if isinstance(event, Finished):
            self._ended = True
            self._metrics.totals["pictures"] += len(event.result) if self._job.draws else 0
        return event


async def job_of(parsed: Parsed, limits: Limits) -> Job:
    """The job of a request, its images decoded in another thread. Raises ApiError for an unusable one."""
    items = await asyncio.to_thread(open_uploads, parsed.items, limits)
    return Job(items, parsed.draws, parsed.options, parsed.previews)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ApiError then.

    Args:
        request: its body has been read.
        work: coroutine that makes the answer.
    """
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left(request.receive))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ApiError(CLIENT_LEFT, "the client has left")
    finally:
        await cancelled(doing, leaving)


async def left(receive: Receive) -> None:
    """Wait until the client has left; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended; their errors are dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
