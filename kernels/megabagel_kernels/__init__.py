"""Operations of MegaBAGEL that no library has: attention under its mask, keyed noise, the flow loss; and norms,
rotation and SwiGLU in few passes over memory.

Depends on torch and NumPy alone. Every operation has one torch reference that tests and benchmarks share.
"""
