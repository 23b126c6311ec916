"""Bodies of the OpenAI API to what they ask for. Pure: no model, no network.

Fields of OpenAI's that this server has no equivalent for are refused unless they hold the value that changes nothing;
its own fields (`steps`, `preset`, `think`, guidance) have the names of the Python interface.
"""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from megabagel.inference.presets import PRESETS
from megabagel.sampling.guidance import Renorm
from megabagel.serve.errors import ApiError
from megabagel.serve.fields import Fields
from megabagel.serve.limits import Limits
from megabagel.serve.multipart import FormPart
from megabagel.serve.uploads import from_data_url

_MOST_SEED = 2**53 - 1
"""JSON numbers beyond are not exact in every client."""
_MOST_TOKENS = 1 << 20
_ABOUT_THE_CALLER = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "moderation",
    "quality", "style", "input_fidelity", "output_compression", "reasoning_effort", "verbosity",
)  # fmt: skip
"""Fields without influence on what this server makes."""


@dataclass(frozen=True, eq=False)
class Parsed:
    """A checked request, its images still as files."""

    model: str | None
    items: tuple[str | bytes, ...]
    draws: bool
    options: dict[str, Any] = field(default_factory=dict)
    """Of `Pipeline.submit_draw` or `submit_answer`."""
    previews: int = 0
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False
    """Whether a stream ends with a chunk of token counts."""


def parse_chat(body: Mapping[str, Any], limits: Limits) -> Parsed:
    """A chat completion: an answer, or a picture where `modalities` has `image`."""
    fields = Fields(body)
    model = fields.required("model")
    items = _messages(fields, limits)
    modalities = fields.raw("modalities")
    allowed = (["text"], ["image"], ["text", "image"], ["image", "text"])
    if modalities is not None and modalities not in allowed:
        raise fields.wrong("modalities", modalities, "['text'], ['image'] or ['text', 'image']", "unsupported_value")
    fields.only("n", 1)
    stream, usage = _streaming(fields)
    _refuse_what_chat_lacks(fields)
    if "image" in (modalities or ()):
        options = _drawing(fields, limits, think="text" in modalities)
        most = _most_tokens(fields)
        if most is not None:
            options["thought_tokens"] = most
        previews = _previews(fields, limits)
        found = Parsed(model, items, True, options | {"n": 1}, previews if stream else 0, (), stream, usage)
    else:
        options, stops = _decoding(fields)
        found = Parsed(model, items, False, options, 0, stops, stream, usage)
    fields.finish()
    return found


def parse_generation(body: Mapping[str, Any], limits: Limits) -> Parsed:
    """Pictures from a prompt."""
    fields = Fields(body)
    return _pictures(fields, (fields.required("prompt"),), limits, {})


def parse_edit(parts: Sequence[FormPart], limits: Limits) -> Parsed:
    """Pictures from images and an instruction, from the parts of a form."""
    images: list[str | bytes] = []
    plain: dict[str, Any] = {}
    for part in parts:
        if part.name in ("image", "image[]"):
            images.append(part.data)
        elif part.name in plain:
            raise ApiError(400, f"{part.name}: given twice; expected once", "invalid_value", part.name)
        elif part.filename is not None:
            raise ApiError(
                400, f"{part.name}: no such file here; expected image (a mask is not supported)", "unsupported_value",
                part.name,
            )  # fmt: skip
        else:
            plain[part.name] = part.data.decode("utf-8", "replace")
    if not images:
        raise ApiError(400, "image: expected at least one file of this name", "missing_required_parameter", "image")
    _check_count(len(images), limits)
    fields = Fields(plain, textual=True)
    return _pictures(fields, (*images, fields.required("prompt")), limits, {"preset": "edit"})


def _pictures(fields: Fields, items: tuple[str | bytes, ...], limits: Limits, defaults: Mapping[str, Any]) -> Parsed:
    model = fields.text("model")
    n = fields.integer("n", 1, 1, limits.pictures)
    stream = fields.flag("stream")
    if stream and n != 1:
        raise fields.wrong("n", n, "1 with stream", "unsupported_value")
    fields.only("response_format", "b64_json")
    fields.only("output_format", "png")
    fields.only("background", "auto", "opaque")
    fields.ignore(*_ABOUT_THE_CALLER)
    options = {**defaults, **_drawing(fields, limits, think=False), "n": n}
    previews = _previews(fields, limits)
    fields.finish()
    return Parsed(model, items, True, options, previews if stream else 0, (), stream)


def _previews(fields: Fields, limits: Limits) -> int:
    return fields.integer("partial_images", 0, 0, limits.previews) or 0


def _drawing(fields: Fields, limits: Limits, think: bool) -> dict[str, Any]:
    """Options of `Pipeline.submit_draw` but `n`; those that were not given are left out."""
    found: dict[str, Any] = {
        "size": _size(fields),
        "seed": _seed(fields),
        "points": fields.integer("steps", None, 1, limits.steps),
        "preset": fields.choice("preset", tuple(PRESETS)),
        "think": fields.flag("think", think),
        "thought_tokens": fields.integer("thought_tokens", None, 1, _MOST_TOKENS),
        "shift": fields.number("shift", None, 1e-3, 1e3),
        "text_scale": fields.number("text_scale", None, 0, 1e3),
        "image_scale": fields.number("image_scale", None, 0, 1e3),
        "interval": _interval(fields),
        "renorm": fields.choice("renorm", get_args(Renorm)),
        "renorm_min": fields.number("renorm_min", None, 0, 1),
        "taylorseer": fields.flag("taylorseer"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _decoding(fields: Fields) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Options of `Pipeline.submit_answer`, and stop texts."""
    options = {
        "max_new_tokens": _most_tokens(fields) or 1000,
        "temperature": fields.number("temperature", 0.0, 0, 2),
        "top_p": fields.number("top_p", 1.0, 1e-6, 1),
        "seed": _seed(fields),
        "think": fields.flag("think"),
    }
    stop = fields.raw("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and s for s in stops):
        raise fields.wrong("stop", stop, "a text, or a list of at most four")
    return options, tuple(stops)


def _most_tokens(fields: Fields) -> int | None:
    """The limit of decoded tokens, under its new or its old name."""
    older = fields.integer("max_tokens", None, 1, _MOST_TOKENS)
    return fields.integer("max_completion_tokens", older, 1, _MOST_TOKENS)


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether to count tokens at the end of the stream."""
    stream, given = fields.flag("stream"), fields.raw("stream_options")
    if given is None:
        return stream, False
    if not isinstance(given, dict) or not stream:
        raise fields.wrong("stream_options", given, "an object, and stream=true")
    inner = Fields(given, where="stream_options.")
    usage = inner.flag("include_usage")
    inner.ignore("include_obfuscation")
    inner.finish()
    return stream, usage


def _refuse_what_chat_lacks(fields: Fields) -> None:
    fields.only("frequency_penalty", 0, 0.0)
    fields.only("presence_penalty", 0, 0.0)
    fields.only("logprobs", False)
    fields.only("top_logprobs", 0)
    fields.only("logit_bias", {})
    fields.only("tools", [])
    fields.only("tool_choice", "none", "auto")
    fields.only("parallel_tool_calls", True, False)
    fields.only("response_format", {"type": "text"})
    fields.ignore(*_ABOUT_THE_CALLER)


def _seed(fields: Fields) -> int:
    """The seed that was given, or a random one: calls without a seed differ, and the answer holds theirs."""
    seed = fields.integer("seed", None, 0, _MOST_SEED)
    return secrets.randbelow(2**31) if seed is None else seed


def _size(fields: Fields) -> tuple[int, int] | None:
    text = fields.text("size")
    if text is None or text == "auto":
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise fields.wrong("size", text, "WIDTHxHEIGHT in pixels, such as 1024x576, or auto")
    return int(found[1]), int(found[2])


def _interval(fields: Fields) -> tuple[float, float] | None:
    """Of guided timesteps: [lo, hi], or "lo,hi" in a form."""
    value = fields.raw("interval")
    if value is None:
        return None
    pair = value.split(",") if isinstance(value, str) else value
    try:
        low, high = (float(x) for x in pair)
    except (TypeError, ValueError):
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise fields.wrong("interval", value, "two numbers from 0 to 1, the smaller first")
    return low, high


def _messages(fields: Fields, limits: Limits) -> tuple[str | bytes, ...]:
    """Texts and images of all messages, in order: the model's contexts have no roles."""
    messages = fields.raw("messages")
    if not isinstance(messages, list) or not messages:
        raise fields.wrong("messages", messages, "a list of at least one message")
    items: list[str | bytes] = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            raise fields.wrong(f"messages[{number}]", message, "an object with role and content")
        items += _message(Fields(message, where=f"messages[{number}]."))
    if not items:
        raise fields.wrong("messages", messages, "a text or an image in one of them")
    _check_count(sum(isinstance(item, bytes) for item in items), limits)
    return tuple(items)


def _message(fields: Fields) -> list[str | bytes]:
    """Items of one message; texts side by side are one item."""
    role = fields.choice("role", ("system", "developer", "user", "assistant"))
    if role is None:
        raise fields.wrong("role", None, "system, developer, user or assistant", "missing_required_parameter")
    content, images = fields.raw("content"), fields.raw("images") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list) or not isinstance(images, list):
        raise fields.wrong("content", content, "a text or a list of parts")
    fields.ignore("name", "refusal", "annotations")
    fields.only("tool_calls", [])
    fields.finish()
    items: list[str | bytes] = []
    for number, part in enumerate([*parts, *images]):
        item = _part(part, fields, f"content[{number}]")
        if isinstance(item, str) and items and isinstance(items[-1], str):
            items[-1] += "\n" + item
        elif item:
            items.append(item)
    return items


def _part(part: Any, fields: Fields, name: str) -> str | bytes:
    """A text, or the file of an image."""
    match part:
        case {"type": "text", "text": str(text)}:
            return fields.clean(name, text)
        case {"type": "image_url", "image_url": {"url": str(url)}}:
            return from_data_url(url, "image_url")
        case {"type": kind} if kind not in ("text", "image_url"):
            raise fields.wrong(name, kind, "a part of type text or image_url", "unsupported_value")
    raise fields.wrong(name, part, 'such as {"type": "text", "text": "..."}')


def _check_count(images: int, limits: Limits) -> None:
    if images > limits.images:
        raise ApiError(413, f"{images} input images: expected at most {limits.images}", "too_many_images")
