"""Decoding: from the bytes of image files to pixel tensors of the model's sizes (docs/bagel.md#image-sizes).

`contract.py` defines the interface of an engine; `headers.py` reads sizes and enforces limits before pixels are
decoded. Engines: `host.py` (Pillow, the reference) and `dali.py` (NVIDIA DALI); `choice.py` selects one. docs/data.md
has the rules per file format.
"""

from typing import TYPE_CHECKING, Any

from megabagel.data.decode.contract import DecodeEngine, DecodeError, Request, Views
from megabagel.data.decode.headers import measure

if TYPE_CHECKING:
    from megabagel.data.decode.choice import choose_engine

__all__ = ["DecodeEngine", "DecodeError", "Request", "Views", "choose_engine", "measure"]


def __getattr__(name: str) -> Any:
    """Import the engines, and torch with them, where one is chosen: sizes are read without."""
    if name != "choose_engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megabagel.data.decode.choice import choose_engine

    return choose_engine
