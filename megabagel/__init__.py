"""Training of BAGEL-like Mixture-of-Transformers on any grid of tensor, pipeline, context and data parallelism."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabagel.inference.api import load_pretrained

__all__ = ["load_pretrained"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line must not wait for torch."""
    if name == "load_pretrained":
        from megabagel.runtime import cpu_backend

        cpu_backend.install()  # before anything imports megatron
        from megabagel.inference import api

        return api.load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
