"""Stage activations: the p2p payload between pipeline stages, one tensor of constant shape per micro-batch.

Rows are this rank's [und | gen] rows. Columns are the hidden state, then flow target and loss weight of gen rows, which
are made on the first stage (it encodes the images) and needed on the last (it computes the loss). These are fp32
numbers, reinterpreted bit by bit as the payload's type, so that a bf16 pipeline does not round the target.

Shape letters: docs/notation.md; here W is the width of the payload ("wire").
"""

import torch

from megabagel.config.schema import ModelConfig
from megabagel.model.inputs import Hidden


def wire_width(model: ModelConfig, dtype: torch.dtype) -> int:
    """Return W in elements of `dtype`: hidden width plus the fp32 flow target and loss weight."""
    return model.hidden + (model.latent_dim + 1) * (4 // dtype.itemsize)


def to_wire(hidden: Hidden) -> torch.Tensor:
    """Pack hidden states, flow target and weight into [T, 1, W], the [sequence, batch, hidden] of megatron-core."""
    rows_TD = torch.cat([hidden.und_uD, hidden.gen_gD])
    gen_gZ = torch.cat([hidden.target_gZ, hidden.weight_g[:, None]], 1)
    carried = torch.cat([gen_gZ.new_zeros(len(hidden.und_uD), gen_gZ.shape[1]), gen_gZ])
    return torch.cat([rows_TD, carried.view(rows_TD.dtype)], 1)[:, None]


def from_wire(wire_T1W: torch.Tensor, und_rows: int, width: int) -> Hidden:
    """Unpack the payload of the previous stage.

    Args:
        wire_T1W: [T, 1, W] from `to_wire`.
        und_rows: number of und rows, which come first.
        width: width of the hidden state.
    """
    wire_TW = wire_T1W[:, 0]
    # Target and weight need no gradient; without `detach` autograd would send one through reinterpreted bits.
    carried = wire_TW[und_rows:, width:].detach().contiguous().view(torch.float32)
    return Hidden(wire_TW[:und_rows, :width], wire_TW[und_rows:, :width], carried[:, :-1], carried[:, -1])
