"""A client of an OpenAI-compatible `chat/completions` endpoint, by the standard library alone.

The key comes from the environment and goes into one header: no message, log or file holds it. Requests that may succeed
later (time-outs, lost connections, status 408, 409, 429 and 5xx, an answer that is no JSON) are repeated a bounded
number of times with growing waits, or after the seconds of `Retry-After`; others end the command at once.
"""

import base64
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any

from megabagel.errors import TransientFailure, UserError

AGAIN = (408, 409, 429)
"""Status codes, beside 5xx, after which a request is repeated."""
LONGEST_WAIT_S = 60.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Completion:
    """An answer, with the tokens that it took and its price."""

    text: str
    prompt_tokens: int = 0
    answer_tokens: int = 0
    cost: float = 0.0


@dataclass
class ChatClient:
    """An OpenAI-compatible endpoint."""

    url: str
    """Base address, such as https://api.openai.com/v1."""
    model: str
    timeout: float = 120.0
    """Seconds per request."""
    tries: int = 6
    rate: float = 0.0
    """Most requests per minute; 0: no limit."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Price of a million tokens of questions and of answers."""
    sleep: Callable[[float], None] = time.sleep
    keys: tuple[str, ...] = ("OPENAI_API_KEY",)
    """Environment variables with the key, in order; a local endpoint may need none."""
    role: str = "model"
    """What the endpoint is for; starts messages."""
    kept: str = "What is finished is kept"
    """What is not lost when the client gives up; for the message."""
    spent: float = 0.0
    """Price of all answers so far."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = 0.0

    def complete(self, messages: Sequence[Any], max_tokens: int) -> Completion:
        """Ask at temperature 0. Raises UserError for a refusal, TransientFailure after the last try."""
        body = json.dumps({
            "model": self.model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
        }).encode()  # fmt: skip
        for number in range(self.tries):
            self._pace()
            try:
                return self._completion(self._post(body))
            except _Later as error:
                reason, wait = str(error), error.wait
            if number + 1 < self.tries:
                wait = min(LONGEST_WAIT_S, wait if wait is not None else 2.0**number)
                again = f"try {number + 2} of {self.tries} in {wait:.1f} s"
                logger.warning("%s %s: %s; %s", self.role, self.model, reason, again)
                self.sleep(wait)
        raise TransientFailure(
            f"{self.role} {self.model}: no answer in {self.tries} tries, last: {reason}. {self.kept}; "
            "start the same command again."
        )

    def _pace(self) -> None:
        """Wait for this request's turn under the rate limit; turns are handed out in order to all threads."""
        if not self.rate:
            return
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + 60.0 / self.rate
        if turn > now:
            self.sleep(turn - now)

    def _post(self, body: bytes) -> Any:
        key = next((os.environ[name] for name in self.keys if os.environ.get(name)), None)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        asked = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(asked, timeout=self.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            said = _without(error.read()[:300].decode(errors="replace"), key)
            if error.code in AGAIN or error.code >= 500:
                raise _Later(f"status {error.code} ({said})", _seconds(error.headers.get("Retry-After"))) from None
            hint = f"; set {' or '.join(self.keys)}" if error.code in (401, 403) else ""
            raise UserError(f"{self.role} {self.model}: refused with status {error.code} ({said}){hint}") from None
        except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
            raise _Later(_without(f"{type(error).__name__}: {error}", key), None) from None
        try:
            return json.loads(content)
        except ValueError:
            raise _Later("an answer that is no JSON", None) from None

    def _completion(self, content: Any) -> Completion:
        try:
            text = content["choices"][0]["message"]["content"] or ""
            usage = content.get("usage") or {}
            asked, answered = (int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens"))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise _Later("an answer without choices[0].message.content", None) from None
        cost = (asked * self.prices[0] + answered * self.prices[1]) / 1e6
        with self._lock:
            self.spent += cost
        return Completion(str(text), asked, answered, cost)


class _Later(Exception):
    """A failure that a further try may not meet; `wait` are the seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None) -> None:
        super().__init__(reason)
        self.wait = wait


def chat_messages(system: str | None, parts: Sequence[str | tuple[str, bytes]]) -> list[dict[str, Any]]:
    """The chat messages of a question.

    Args:
        system: the system prompt, if there is one.
        parts: texts, and images as (media type such as "png", bytes of the file), which become data URLs.
    """
    content: list[dict[str, Any]] = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        else:
            kind, data = part
            url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


def _seconds(text: str | None) -> float | None:
    """Seconds of a `Retry-After` header; None for a date or nothing."""
    return float(text) if text and text.replace(".", "", 1).isdecimal() else None


def _without(text: str, key: str | None) -> str:
    """Foreign text without the key, which a server may echo."""
    return " ".join((text.replace(key, "***") if key else text).split())
