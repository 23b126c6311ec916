"""Writer of one safetensors file of any size in little memory."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import safe_open

from megabagel.checkpoint.index import NAMES
from megabagel.checkpoint.lazy import LazyTensor

_ORDER = ("F64", "F32", "BF16", "F16")
"""Types as the library orders them: the widest first, so that every tensor is aligned."""


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write tensors as the safetensors library would, byte for byte, but piece by piece; then let it read the header.

    Raises OSError when the disk refuses.
    """
    names = sorted(tensors, key=lambda name: (_ORDER.index(NAMES[tensors[name].dtype]), name))
    with path.open("wb") as file:
        file.write(_header(names, tensors))
        for name in names:
            _lay_down(file, tensors[name])
        file.flush()
        os.fsync(file.fileno())
    _verify(path, tensors)


def _lay_down(file: BinaryIO, tensor: LazyTensor) -> None:
    """A function, so that its last piece, which may be a whole tensor, is gone when the next one is read."""
    start = file.tell()
    for piece in tensor.read():
        file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    assert file.tell() - start == tensor.nbytes


def _header(names: list[str], tensors: Mapping[str, LazyTensor]) -> bytes:
    """Length and JSON header, padded so that the numbers start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        tensor = tensors[name]
        stop = at + tensor.nbytes
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _verify(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Check that the safetensors library reads names, shapes and types as intended."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    assert found == {name: (tensor.shape, NAMES[tensor.dtype]) for name, tensor in tensors.items()}
