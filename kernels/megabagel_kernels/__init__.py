"""Operations of MegaBAGEL that no library has: attention under its mask, keyed noise, the flow loss.

Depends on torch and NumPy alone. Every operation has one torch reference that tests and benchmarks share.
"""
