"""The ASGI application: routes, errors in OpenAI's form, and the web page."""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from megabagel.serve import chat, images
from megabagel.serve.errors import ApiError
from megabagel.serve.guard import Guard
from megabagel.serve.metrics import CONTENT_TYPE
from megabagel.serve.service import Service

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy of the page: everything is in the one file, and it talks to this server alone."""

Handler = Callable[[Request, Service], Awaitable[Response]]


def build_app(service: Service) -> ASGIApp:
    """The application of one served model."""

    def route(path: str, handler: Handler, method: str = "GET") -> Route:
        async def handle(request: Request) -> Response:
            return await handler(request, service)

        return Route(path, handle, methods=[method])

    app = Starlette(
        routes=[
            route("/", _page),
            route("/health", _health),
            route("/metrics", _metrics),
            route("/v1/models", _models),
            route("/v1/models/{name:path}", _model),
            route("/v1/chat/completions", chat.complete, "POST"),
            route("/v1/images/generations", images.generate, "POST"),
            route("/v1/images/edits", images.edit, "POST"),
        ],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unforeseen},
    )
    return Guard(app, service)


async def _page(_request: Request, _service: Service) -> Response:
    text = (files("megabagel.serve") / "page.html").read_text("utf-8")
    return HTMLResponse(text, headers={"Content-Security-Policy": _POLICY, "Referrer-Policy": "no-referrer"})


async def _health(_request: Request, service: Service) -> Response:
    state = service.worker.state
    return JSONResponse({"status": state, "model": service.name}, 200 if state == "ready" else 503)


async def _metrics(_request: Request, service: Service) -> Response:
    return PlainTextResponse(service.metrics.text(service.gauges()), media_type=CONTENT_TYPE)


async def _models(_request: Request, service: Service) -> Response:
    return JSONResponse({"object": "list", "data": [service.card()]})


async def _model(request: Request, service: Service) -> Response:
    service.require_model(request.path_params["name"])
    return JSONResponse(service.card())


async def _api_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    """An unknown path or method."""
    assert isinstance(error, HTTPException)
    found = ApiError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}", "unknown_url")
    return JSONResponse(found.body, found.status, error.headers)


async def _unforeseen(_request: Request, _error: Exception) -> Response:
    """A bug; uvicorn logs its traceback."""
    found = ApiError(500, "the request met a bug of the server; its log has the traceback", "internal_error")
    return JSONResponse(found.body, 500)
