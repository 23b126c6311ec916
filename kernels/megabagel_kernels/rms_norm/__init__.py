"""RMSNorm, and residual add + RMSNorm (https://arxiv.org/abs/1910.07467)."""

from megabagel_kernels.rms_norm.functional import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "rms_norm"]
