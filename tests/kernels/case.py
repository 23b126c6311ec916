"""A kernel case: one call, its definition and its inputs; an operation's tests and the GPU suite share them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Function = Callable[..., Tensor | Sequence[Tensor | None]]


@dataclass(frozen=True)
class Case:
    """An operation (engine "triton") and its reference, both functions of `leaves`."""

    name: str
    ours: Function
    reference: Function
    leaves: list[Tensor]


class Numbers(Protocol):
    """Source of inputs that depend on a key and a shape only. Tests use `CPU`, the GPU suite its own."""

    @property
    def device(self) -> torch.device: ...

    def normal(self, *shape: int, key: str, dtype: torch.dtype) -> Tensor:
        """Normal numbers."""

    def integers(self, top: int, *shape: int, key: str) -> Tensor:
        """int64 in [0, top)."""


class _Cpu:
    device = torch.device("cpu")

    def normal(self, *shape: int, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=_generator(key, shape)).to(dtype)

    def integers(self, top: int, *shape: int, key: str) -> Tensor:
        return torch.randint(top, shape, generator=_generator(key, shape))


def _generator(key: str, shape: tuple[int, ...]) -> torch.Generator:
    return torch.Generator().manual_seed(sum(key.encode()) + 1000 * sum(shape) + 31 * len(shape))


CPU = _Cpu()
