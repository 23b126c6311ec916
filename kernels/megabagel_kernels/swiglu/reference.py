"""Definition of SwiGLU with the rounding of BAGEL's released model: after silu, and after the product.

Letters: T rows, F MLP width.
"""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [T, 2 F], gate first -> [T, F]; fp32 inside (fp64 for fp64)."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, -1)
    active = functional.silu(gate).to(gate_up.dtype)
    return (active * up).to(gate_up.dtype)
