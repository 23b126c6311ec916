"""SwiGLU: silu(gate) * up (https://arxiv.org/abs/2002.05202)."""

from megabagel_kernels.swiglu.functional import swiglu

__all__ = ["swiglu"]
