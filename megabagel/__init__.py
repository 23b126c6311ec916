"""Training, inference and judging of BAGEL-like Mixture-of-Transformers on any grid of parallel ranks.

The names below are the Python interface (docs/python.md). Each is imported on first use, so `import megabagel` costs
milliseconds and loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabagel.api import (
        attention_mask,
        batches,
        compare_runs,
        forward,
        load_config,
        open_checkpoint,
        read_metrics,
        train_steps,
    )
    from megabagel.config.schema import Config
    from megabagel.errors import UserError
    from megabagel.inference.api import load_pretrained
    from megabagel.model.bagel import Bagel
    from megabagel.model.factory import SingleDevice

_HOMES = {
    "Config": "megabagel.config.schema",
    "UserError": "megabagel.errors",
    "Bagel": "megabagel.model.bagel",
    "SingleDevice": "megabagel.model.factory",
    "load_config": "megabagel.api",
    "batches": "megabagel.api",
    "attention_mask": "megabagel.api",
    "forward": "megabagel.api",
    "train_steps": "megabagel.api",
    "open_checkpoint": "megabagel.api",
    "read_metrics": "megabagel.api",
    "compare_runs": "megabagel.api",
    "load_pretrained": "megabagel.inference.api",
}
"""Where each name lives."""

_OVER_MEGATRON = ("load_pretrained",)
"""Names whose module imports megatron-core, which wants the CPU backend in place first."""

__all__ = [
    "Bagel",
    "Config",
    "SingleDevice",
    "UserError",
    "attention_mask",
    "batches",
    "compare_runs",
    "forward",
    "load_config",
    "load_pretrained",
    "open_checkpoint",
    "read_metrics",
    "train_steps",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _OVER_MEGATRON:
        from megabagel.runtime import cpu_backend

        cpu_backend.install()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion in a notebook."""
    return sorted(__all__)
