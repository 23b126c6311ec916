"""Linears with weights in oneDNN's layout, for fp32 inference on a CPU.

Plain torch calls MKL, which reorders the weights in every product of a few rows, so a decoded token costs twice what it
takes to read them once; and its products of 1 to 3 rows have other last bits than larger ones. oneDNN's products on
reordered weights have the same bits at any number of rows on the CPUs that were tried (AVX2), and are as fast or faster
at all sizes. Whether they have the same bits here is checked when a model is loaded.

oneDNN compiles and keeps code for every number of rows that it meets, of which continuous batching makes thousands: a
server grew by 100 MiB in 100 requests. Rows are therefore filled up to one of a few numbers.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Private operators of torch, those that torch.compile uses on a CPU. There is no public way to keep reordered weights.
_OPS: Any = torch.ops.mkldnn

ROWS = (1, 2, 3, 8, 17, 40)
"""Numbers of rows at which products are compared with those of a larger block."""


MOST_ROWS = 1024
"""Rows of one product; more are cut into blocks."""


def filled(rows: int) -> int:
    """Number of rows that `rows` are filled up to: one of 36 up to MOST_ROWS, less than half more."""
    if rows <= 2:
        return rows
    step = 4 if rows <= 16 else 8 if rows <= 64 else 16 if rows <= 256 else 64
    return -(-rows // step) * step


class PackedLinear(nn.Module):
    """A linear with reordered weights; also a word head, by `logits`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.inputs = weight.shape[1]
        self.packed = _OPS._reorder_linear_weight(weight.detach().contiguous(), None)
        self.bias = bias
        self._linear = _OPS._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to rows [T, inputs]."""
        rows = len(x)
        if rows > MOST_ROWS:
            return torch.cat([self(block) for block in x.split(MOST_ROWS)])
        if (block := filled(rows)) == rows:
            return self._linear(x, self.packed, self.bias, "none", [], "")
        x = nn.functional.pad(x, (0, 0, 0, block - rows))
        return self._linear(x, self.packed, self.bias, "none", [], "")[:rows]

    def logits(self, hidden_QD: Tensor) -> Tensor:
        """Return fp32 logits [Q, V] of [Q, D]."""
        return self(hidden_QD).float()

    def same_bits(self) -> bool:
        """Whether a row's result does not depend on the number of rows beside it."""
        x = torch.randn(64, self.inputs, generator=torch.Generator().manual_seed(0))
        whole = self(x)
        return all(torch.equal(self(x[:rows].contiguous()), whole[:rows]) for rows in ROWS)


def pack_linears(stage: nn.Module) -> bool:
    """Replace all linears and word heads of a filled model by packed ones; returns whether that was possible.

    Nothing is replaced where a parameter is not fp32 on a CPU, torch has no oneDNN, or bits depend on the rows.
    """
    plain = all(p.device.type == "cpu" and p.dtype == torch.float32 for p in stage.parameters())
    if not plain or not torch.backends.mkldnn.is_available():
        return False
    with torch.inference_mode():
        for shape, one in {one.weight.shape: one for _, _, one in _linears(stage)}.items():
            if not _packed(one).same_bits():
                logger.info("linears stay as they are: oneDNN's bits depend on the number of rows at %s", shape)
                return False
        for parent, name, one in list(_linears(stage)):
            setattr(parent, name, _packed(one))
    return True


def _packed(one: Any) -> PackedLinear:
    return PackedLinear(one.weight, getattr(one, "bias", None))


def _linears(stage: nn.Module) -> Iterator[tuple[nn.Module, str, Any]]:
    """(module that holds it, its name there, linear or head)."""
    for parent in stage.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) or name == "lm_head":
                yield parent, name, child
