"""ASGI middleware before all routes: who may ask, and how many requests may be under way."""

import hmac
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megabagel.serve.client import CLIENT_LEFT
from megabagel.serve.errors import ApiError, queue_full, stopping
from megabagel.serve.service import Service

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
PATHS = ("/v1/chat/completions", "/v1/images/generations", "/v1/images/edits")
"""Paths that make the model work."""


class Guard:
    """Checks host, key and queue before a route sees a request, and counts its answer.

    Requests beyond the queue's limit are answered before their body is read, which bounds the memory for bodies.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        assert scope["type"] == "http"
        service, path, began = self._service, scope["path"], time.monotonic()
        status = CLIENT_LEFT

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        works = scope["method"] == "POST" and path in PATHS
        admitted = False
        try:
            self._check(scope)
            if works:
                self._check_queue()
                service.under_way += 1
                admitted = True
            await self._app(scope, receive, watched)
        except ApiError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, watched)
        finally:
            service.under_way -= admitted
            if works:
                service.metrics.answered(path, status, time.monotonic() - began)

    def _check(self, scope: Scope) -> None:
        """Raise ApiError if the caller may not ask."""
        service, headers = self._service, Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if service.loopback and _split(f"//{host}")[0] not in _LOOPBACK:
            # DNS rebinding: a foreign page can give its own name this machine's address, but not another Host header.
            raise ApiError(403, f"Host is {host[:80]!r}: this server answers as 127.0.0.1 or localhost", "wrong_host")
        if origin is not None and _split(origin)[1] != host:
            raise ApiError(403, "requests from other web pages are not served", "wrong_origin")
        if service.key is not None and (scope["path"].startswith("/v1/") or scope["path"] == "/metrics"):
            given = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(given, b"Bearer " + service.key):
                raise ApiError(401, "wrong or missing API key: expected Authorization: Bearer KEY", "invalid_api_key")

    def _check_queue(self) -> None:
        """Raise ApiError if the server ends or is full."""
        service = self._service
        if service.worker.state != "ready":
            raise stopping()
        if service.under_way >= service.limits.queue:
            raise queue_full(
                f"{service.under_way} requests are under way, the limit is {service.limits.queue}: try later"
            )


def _split(url: str) -> tuple[str | None, str]:
    """Host name, and host with port, of a URL; nothing for a malformed one."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, ""
