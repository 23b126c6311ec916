"""Shared state of the routes: the model's name and tokenizer, the worker, limits and counters."""

import time
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request

from megabagel.serve.client import Ticket
from megabagel.serve.errors import ApiError
from megabagel.serve.jobs import Job
from megabagel.serve.limits import Limits
from megabagel.serve.metrics import Metrics
from megabagel.serve.worker import Worker


@dataclass(eq=False)
class Service:
    """One served model."""

    worker: Worker
    name: str
    """Of the model, as clients ask for it."""
    limits: Limits = field(default_factory=Limits)
    key: bytes | None = None
    """API key; None: none is asked for."""
    loopback: bool = True
    """Whether only this machine can connect."""
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    under_way: int = 0
    """Requests that were admitted and are not answered; only the event loop's thread touches it."""

    def __post_init__(self) -> None:
        source = self.worker.model.source
        self.tokenizer = self.worker.model.tokenizer
        self.eos = self.worker.engine.special.eos
        self.fingerprint = f"{source.weights}-{source.digest[:16]}"

    def ticket(self, job: Job, request: Request) -> Ticket:
        """Submit a job."""
        return Ticket(self.worker, job, self.metrics, request.url.path)

    def require_model(self, name: str | None) -> None:
        """Raise ApiError if a request names another model."""
        if name is not None and name != self.name:
            raise ApiError(
                404, f"model={name[:80]!r}: no such model here; expected {self.name!r}", "model_not_found", "model"
            )

    def require_json(self, request: Request) -> None:
        """Raise ApiError unless the body is declared as JSON, which a foreign web page cannot send unasked."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"Content-Type is {kind[:80]!r}: expected application/json", "invalid_content_type")

    def card(self) -> dict[str, Any]:
        """The model as /v1/models shows it; what is beside OpenAI's keys is for the web page."""
        config, source = self.worker.model.config, self.worker.model.source
        model = config.model
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "megabagel",
            "weights": source.weights,
            "digest": source.digest,
            "draws": model.visual_gen,
            "sees": model.visual_und or model.visual_gen,
            "stride": model.latent_stride,
            "most_side": model.latent_grid * model.latent_stride,
            "default_side": min(1024, config.data.vae_resize.max_size),
            "cache_tokens": self.worker.engine.cache.rows,
        }

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Current values for /metrics. Read from another thread than the engine's: each is one integer."""
        engine = self.worker.engine
        return {
            "requests_under_way": ("Admitted requests without a complete answer.", self.under_way),
            "engine_running": ("Requests in the batch.", len(engine.running)),
            "engine_waiting": ("Requests that wait for room in the KV cache.", len(engine.waiting)),
            "engine_passes": ("Forward passes since the start.", engine.passes),
            "cache_pages": ("Pages of the KV cache.", engine.cache.pages),
            "cache_free_pages": ("Pages that no request holds.", engine.cache.free_pages),
        }
