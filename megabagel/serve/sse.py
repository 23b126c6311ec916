"""Server-sent events: the frames of a stream, and the response that sends them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from megabagel.serve.client import cancelled, left
from megabagel.serve.errors import ApiError

_PING_S = 15.0
"""Silence after which a comment is sent, so that proxies keep the connection of a queued request."""
DONE = "data: [DONE]\n\n"
"""Last frame of a chat stream."""


def frame(data: dict[str, Any], event: str | None = None) -> str:
    """One event; `data` is sent as one line of JSON."""
    head = f"event: {event}\n" if event else ""
    return f"{head}data: {json.dumps(data)}\n\n"


class EventStream(StreamingResponse):
    """Response that sends frames until they end or the client leaves; an ApiError becomes the last frame.

    starlette's own response leaves the closing of its iterator to the garbage collector when the client has left, and
    the job would go on until then.

    Args:
        frames: what to send.
        resources: closed at the end, however it comes: cancels a job that is still under way.
    """

    def __init__(self, frames: AsyncIterator[str], resources: AsyncExitStack) -> None:
        super().__init__(frames, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._frames, self._resources = frames, resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        sending, leaving = asyncio.ensure_future(self._send(send)), asyncio.ensure_future(left(receive))
        async with self._resources:
            try:
                await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                await cancelled(sending, leaving)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while (text := await self._upcoming(send)) is not None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _upcoming(self, send: Send) -> str | None:
        """The next frame, with comments while none comes; None at the end."""
        upcoming = asyncio.ensure_future(self._next())
        try:
            while not (await asyncio.wait({upcoming}, timeout=_PING_S))[0]:
                await send({"type": "http.response.body", "body": b": waiting\n\n", "more_body": True})
            return upcoming.result()
        finally:
            await cancelled(upcoming)

    async def _next(self) -> str | None:
        try:
            return await anext(self._frames, None)
        except ApiError as error:
            return frame(error.body)
