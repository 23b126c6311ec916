"""POST /v1/chat/completions: answers, or a picture where `modalities` has `image`."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megabagel.inference.generated import Generated
from megabagel.serve.client import Ticket, job_of, read_body, unless_gone
from megabagel.serve.events import Accepted, Finished, Preview, TokenId
from megabagel.serve.fields import parse_json
from megabagel.serve.parse import Parsed, parse_chat
from megabagel.serve.sse import DONE, EventStream, frame
from megabagel.serve.text_stream import TextStream

if TYPE_CHECKING:
    from megabagel.serve.service import Service


async def complete(request: Request, service: "Service") -> Response:
    """Answer one chat completion."""
    service.require_json(request)
    parsed = parse_chat(parse_json(await read_body(request, service.limits)), service.limits)
    service.require_model(parsed.model)
    job = await job_of(parsed, service.limits)
    async with AsyncExitStack() as stack:
        ticket = await stack.enter_async_context(service.ticket(job, request))
        accepted = await unless_gone(request, ticket.accepted())
        completion = _Completion(service, parsed, ticket, accepted)
        if not parsed.stream:
            return JSONResponse(await unless_gone(request, completion.whole()))
        return EventStream(completion.chunks(), stack.pop_all())


class _Completion:
    """The answer to one request, whole or in chunks."""

    def __init__(self, service: "Service", parsed: Parsed, ticket: Ticket, accepted: Accepted) -> None:
        self._service, self._parsed, self._ticket, self._accepted = service, parsed, ticket, accepted
        self._tokens = 0
        self._reason = "stop"
        self._head = {
            "id": f"chatcmpl-{token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        """The completion in one object."""
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        async for delta in self._deltas():
            message["content"] += delta.pop("content", "")
            message |= delta
        choice = {"index": 0, "message": message, "finish_reason": self._reason, "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[str]:
        """Frames of a stream."""
        yield self._chunk({"role": "assistant", "content": ""})
        async for delta in self._deltas():
            yield self._chunk(delta)
        yield self._chunk({}, self._reason)
        if self._parsed.usage:
            yield frame({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return frame({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    async def _deltas(self) -> AsyncIterator[dict[str, Any]]:
        """What is added to the message, piece by piece: text, partial images, the picture."""
        text, eos = TextStream(self._service.tokenizer, self._parsed.stops), self._service.eos
        ended_by_eos = False
        async for event in self._ticket.events():
            if isinstance(event, TokenId):
                self._tokens += 1
                ended_by_eos = event.id == eos
                piece = "" if ended_by_eos else text.push(event.id)
                if piece:
                    yield {"content": piece}
                if text.stopped:
                    return  # leaving the ticket cancels the rest
            elif isinstance(event, Preview):
                yield {"partial_images": [await _image(Generated(event.pixels).png)]}
            elif isinstance(event, Finished):
                if piece := text.finish():
                    yield {"content": piece}
                if self._parsed.draws:
                    self._tokens = event.output_tokens
                    yield {"images": [await _image(picture.png) for picture in event.result]}
                elif not ended_by_eos and not text.stopped:
                    self._reason = "length"

    def _usage(self) -> dict[str, Any]:
        prompt = self._accepted.text_tokens + self._accepted.image_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._tokens,
            "total_tokens": prompt + self._tokens,
            "prompt_tokens_details": {"image_tokens": self._accepted.image_tokens, "cached_tokens": 0},
        }


async def _image(png: Any) -> dict[str, Any]:
    """A content part with a PNG, compressed in another thread."""
    data = base64.b64encode(await asyncio.to_thread(png)).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
