"""Generalized-causal attention over packed samples (BAGEL section 2.3): text is causal, images see themselves entirely,
noised images are hidden from everything else.

    mask.py             the mask as integers per token (`AttentionRanges`): NumPy only, no torch
    reference.py        dense definition, for tests and benchmarks
    engines.py          one protocol for all engines, and the engines host, flex, fa4 and triton
    host.py             engine for CPUs; tiling.py cuts the mask into its calls
    flex.py             engines on torch's FlexAttention
    triton.py           engine on our Triton kernels: plan and public functions; triton_ops.py the torch operators,
                        triton_forward.py and triton_backward.py the kernels, configs.py their block sizes
    schedule.py         which blocks of the score matrix flex and triton visit
    merge.py            joins attention over parts of the keys

A mask is planned once per batch and the plan serves every layer, so engines.py takes the place of `functional.py`.
There is no `torch.py`, because host and flex are both plain torch. This package imports nothing, so that code without
torch (the data side) can load `mask`.
"""
