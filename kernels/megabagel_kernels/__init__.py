"""GPU and CPU operations of BAGEL that no library offers, usable without the rest of MegaBAGEL.

One folder per operation:

    attention/             attention under BAGEL's mask over packed samples (its `__init__` lists the files)
    rms_norm/              RMSNorm, and residual add + RMSNorm
    qk_norm_rope/          RMSNorm of query or key heads and rotary embedding, for the rows of both experts
    swiglu/                silu(gate) * up
    flow/                  noising of latent images, rectified-flow loss
    float8/                quantization to FP8 with the scaling recipes of Transformer Engine
    linear_cross_entropy/  language-model head and cross-entropy without the full logits

with the same files in each, where the operation needs them:

    reference.py   plain definition in torch, written to be read; tests and benchmarks compare with it
    torch.py       engine "torch": any device and dtype, the one that CPUs run
    triton.py      engine "triton": kernels, their launches and gradients as `torch.library` operators
    functional.py  public functions: check the arguments, then call the engine that the caller names

`checks.py` holds the argument checks, `philox.py` the counter-based noise that both engines draw alike. torch and NumPy
are required; Triton is imported only when its engine is used.
"""
