"""POST /v1/images/generations and /v1/images/edits: pictures as base64 PNGs, with partial images in a stream."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from megabagel.inference.generated import Generated
from megabagel.serve.client import Ticket, job_of, read_body, unless_gone
from megabagel.serve.events import Accepted, Finished, Preview
from megabagel.serve.fields import parse_json
from megabagel.serve.multipart import parse_multipart
from megabagel.serve.parse import Parsed, parse_edit, parse_generation
from megabagel.serve.sse import EventStream, frame

if TYPE_CHECKING:
    from megabagel.serve.service import Service


async def generate(request: Request, service: "Service") -> Response:
    """Pictures from a prompt."""
    service.require_json(request)
    parsed = parse_generation(parse_json(await read_body(request, service.limits)), service.limits)
    return await _answer(request, service, parsed, "image_generation")


async def edit(request: Request, service: "Service") -> Response:
    """Pictures from images and an instruction."""
    kind = request.headers.get("content-type", "")
    parts = parse_multipart(kind, await read_body(request, service.limits))
    return await _answer(request, service, parse_edit(parts, service.limits), "image_edit")


async def _answer(request: Request, service: "Service", parsed: Parsed, kind: str) -> Response:
    service.require_model(parsed.model)
    job = await job_of(parsed, service.limits)
    async with AsyncExitStack() as stack:
        ticket = await stack.enter_async_context(service.ticket(job, request))
        accepted = await unless_gone(request, ticket.accepted())
        if not parsed.stream:
            return JSONResponse(await unless_gone(request, _whole(ticket, accepted)))
        return EventStream(_frames(ticket, accepted, kind), stack.pop_all())


async def _whole(ticket: Ticket, accepted: Accepted) -> dict[str, Any]:
    """All pictures in one object."""
    async for event in ticket.events():
        if isinstance(event, Finished):
            data = [{"b64_json": await _base64(p.png), **_about(p)} for p in event.result]
            return {"created": int(time.time()), "data": data, **_common(event, accepted)}
    raise AssertionError("a job ends with Finished or an error")


async def _frames(ticket: Ticket, accepted: Accepted, kind: str) -> AsyncIterator[str]:
    """Partial images, then the picture, under OpenAI's event names (`kind`: image_generation or image_edit)."""
    number = 0
    async for event in ticket.events():
        now = {"created_at": int(time.time())}
        if isinstance(event, Preview):
            name = f"{kind}.partial_image"
            about = {"partial_image_index": number, "step": event.number, "steps": event.of}
            image = await _base64(Generated(event.pixels).png)
            yield frame({"type": name, "b64_json": image, **about, **now}, name)
            number += 1
        elif isinstance(event, Finished):
            (picture,) = event.result
            name, image = f"{kind}.completed", await _base64(picture.png)
            yield frame({"type": name, "b64_json": image, **now, **_about(picture), **_common(event, accepted)}, name)


def _about(picture: Generated) -> dict[str, Any]:
    """Fields that differ between the pictures of a request; a thought is given as the revised prompt."""
    return {"seed": picture.about["seed"], "revised_prompt": picture.about["thought"]}


def _common(event: Finished, accepted: Accepted) -> dict[str, Any]:
    """Fields that the pictures of a request share."""
    height, width, _ = event.result[0].pixels.shape
    prompt = accepted.text_tokens + accepted.image_tokens
    usage = {
        "input_tokens": prompt,
        "output_tokens": event.output_tokens,
        "total_tokens": prompt + event.output_tokens,
        "input_tokens_details": {"text_tokens": accepted.text_tokens, "image_tokens": accepted.image_tokens},
    }
    return {"size": f"{width}x{height}", "output_format": "png", "background": "opaque", "usage": usage}


async def _base64(png: Any) -> str:
    """A PNG, compressed in another thread."""
    return base64.b64encode(await asyncio.to_thread(png)).decode()
