"""SwiGLU of a fused gate and up projection.

Letters: T rows, F MLP width.
"""

from torch import Tensor

from megabagel_kernels.checks import ANY_FLOAT, FLOATS, Engine, check_dtype, check_engine, check_layout
from megabagel_kernels.swiglu import torch as torch_engine


def swiglu(gate_up: Tensor, *, engine: Engine = "torch") -> Tensor:
    """silu(gate) * up: [T, 2 F], gate first -> [T, F] in the same dtype.

    "triton" keeps only its input for backward, "torch" also silu(gate). Raises ValueError if the argument does not fit.
    """
    check_engine(engine)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected [T, 2 F]")
    check_dtype("gate_up", gate_up, *(ANY_FLOAT if engine == "torch" else FLOATS))
    if engine == "torch":
        return torch_engine.swiglu(gate_up)
    from megabagel_kernels.swiglu import triton as triton_engine

    check_layout("gate_up", gate_up[:1])  # row offsets are 64-bit in this kernel, so one row is enough to check
    return triton_engine.swiglu(gate_up)
