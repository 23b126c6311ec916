"""Decoding: from the bytes of image files to the pixel tensors that the model wants (docs/bagel.md#image-sizes).

`contract.py` says what every engine does, `headers.py` what is known before pixels are. Engines: `host.py` (Pillow, the
reference), `dali.py` (NVIDIA DALI); `choice.py` picks one. docs/data.md has the rules per kind of file.
"""

from megabagel.data.decode.choice import choose_engine
from megabagel.data.decode.contract import DecodeEngine, DecodeError, Request, Views
from megabagel.data.decode.headers import measure

__all__ = ["DecodeEngine", "DecodeError", "Request", "Views", "choose_engine", "measure"]
