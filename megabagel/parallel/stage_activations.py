"""What travels between pipeline stages: one tensor of constant shape per micro-batch.

Rows are this rank's [und | gen] rows; columns are the hidden state, then the flow target and loss weight of gen rows on
their way from the stage that encodes images to the stage that has the loss. The latter are fp32 numbers whose bits
travel unchanged in whatever type the wire has, so that a pipeline split does not round the target.

Shape letters: docs/notation.md; here W is the width of the wire.
"""

import torch

from megabagel.config.schema import ModelConfig
from megabagel.model.inputs import Hidden


def wire_width(model: ModelConfig, dtype: torch.dtype) -> int:
    """W: hidden width and the carried fp32 numbers, in elements of `dtype`."""
    return model.hidden + (model.latent_dim + 1) * (4 // dtype.itemsize)


def to_wire(hidden: Hidden) -> torch.Tensor:
    """Hidden -> [T, 1, W], the shape megatron-core's schedules exchange."""
    rows_TD = torch.cat([hidden.und_uD, hidden.gen_gD])
    gen_gZ = torch.cat([hidden.target_gZ, hidden.weight_g[:, None]], 1)
    carried = torch.cat([gen_gZ.new_zeros(len(hidden.und_uD), gen_gZ.shape[1]), gen_gZ])
    return torch.cat([rows_TD, carried.view(rows_TD.dtype)], 1)[:, None]


def from_wire(wire_T1W: torch.Tensor, und_rows: int, width: int) -> Hidden:
    """[T, 1, W] -> Hidden with `und_rows` und rows and hidden width `width`."""
    wire_TW = wire_T1W[:, 0]
    carried = wire_TW[und_rows:, width:].detach().contiguous().view(torch.float32)
    return Hidden(wire_TW[:und_rows, :width], wire_TW[und_rows:, :width], carried[:, :-1], carried[:, -1])
