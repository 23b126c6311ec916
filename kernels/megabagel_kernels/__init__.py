"""Operations of MegaBAGEL that no library has: attention under its mask, keyed noise, the flow loss; and norms,
rotation, SwiGLU and the head's cross-entropy in few passes over memory.

Depends on torch and NumPy alone; kernels for GPUs on Triton too, which is imported when one of them is launched. Every
operation has one torch reference that tests and benchmarks share.
"""
