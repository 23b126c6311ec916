"""Stage activations: the p2p payload between pipeline stages, one tensor of constant shape per micro-batch.

Rows are this rank's [und | gen] rows. Columns are the hidden state, then flow target and loss weight of gen rows, which
are made on the first stage (it encodes the images) and needed on the last (it computes the loss). These are fp32
numbers, reinterpreted bit by bit as the payload's type, so that a bf16 pipeline does not round the target.

A run whose config has `two_targets` exchanges a second target and weight, in every micro-batch: widths are constant.

Shape letters: docs/notation.md; here W is the width of the payload ("wire").
"""

import torch

from megabagel.config.schema import ModelConfig
from megabagel.model.inputs import Constraint, Hidden


def wire_width(model: ModelConfig, dtype: torch.dtype, two_targets: bool = False) -> int:
    """Return W in elements of `dtype`: hidden width plus the fp32 flow target and loss weight, or two of each."""
    return model.hidden + (1 + two_targets) * (model.latent_dim + 1) * (4 // dtype.itemsize)


def to_wire(hidden: Hidden, two_targets: bool = False) -> torch.Tensor:
    """Pack hidden states, flow target and weight into [T, 1, W], the [sequence, batch, hidden] of megatron-core."""
    rows_TD = torch.cat([hidden.und_uD, hidden.gen_gD])
    parts = [hidden.target_gZ, hidden.weight_g[:, None]]
    if two_targets:
        second = hidden.constraint or Constraint(torch.zeros_like(parts[0]), torch.zeros_like(hidden.weight_g))
        parts += [second.target_gZ, second.weight_g[:, None]]
    gen_gZ = torch.cat(parts, 1)
    carried = torch.cat([gen_gZ.new_zeros(len(hidden.und_uD), gen_gZ.shape[1]), gen_gZ])
    # No view, because schedules free the payload's memory once it is sent (`deallocate_pipeline_outputs`).
    return torch.cat([rows_TD[:, None], carried.view(rows_TD.dtype)[:, None]], 2)


def from_wire(wire_T1W: torch.Tensor, und_rows: int, width: int, two_targets: bool = False) -> Hidden:
    """Unpack the payload of the previous stage.

    Args:
        wire_T1W: [T, 1, W] from `to_wire`.
        und_rows: number of und rows, which come first.
        width: width of the hidden state.
        two_targets: as for `to_wire`.
    """
    wire_TW = wire_T1W[:, 0]
    # Target and weight need no gradient; without `detach` autograd would send one through reinterpreted bits.
    carried = wire_TW[und_rows:, width:].detach().contiguous().view(torch.float32)
    und_uD, gen_gD = wire_TW[:und_rows, :width], wire_TW[und_rows:, :width]
    if not two_targets:
        return Hidden(und_uD, gen_gD, carried[:, :-1], carried[:, -1])
    first, second = carried.chunk(2, 1)
    return Hidden(und_uD, gen_gD, first[:, :-1], first[:, -1], Constraint(second[:, :-1], second[:, -1]))
