"""A request as data: what the HTTP side hands to the engine, and what rank 0 sends to the other ranks of a grid."""

import base64
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from megabagel.data.decode.headers import decode


@dataclass(frozen=True, eq=False)
class Upload:
    """An image that a client has sent, decoded once on rank 0."""

    blob: bytes
    """The file; other ranks decode it again, which is less to send than pixels."""
    image: Image.Image
    """RGB."""


@dataclass(frozen=True, eq=False)
class Job:
    """An answer or a set of pictures to make."""

    items: tuple[str | Upload, ...]
    draws: bool
    """Pictures (`Pipeline.submit_draw`) rather than an answer (`Pipeline.submit_answer`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that method; values that JSON can hold."""
    previews: int = 0
    """Partial images, evenly spread over the steps."""


def to_wire(job: Job) -> dict[str, Any]:
    """A job as JSON values."""
    items = [item if isinstance(item, str) else {"base64": base64.b64encode(item.blob).decode()} for item in job.items]
    return {"items": items, "draws": job.draws, "options": job.options, "previews": job.previews}


def from_wire(wire: dict[str, Any]) -> Job:
    """The job again, on another rank."""
    items = tuple(item if isinstance(item, str) else _upload(item) for item in wire["items"])
    return Job(items, wire["draws"], wire["options"], wire["previews"])


def _upload(item: dict[str, str]) -> Upload:
    blob = base64.b64decode(item["base64"])
    return Upload(blob, decode(blob))
