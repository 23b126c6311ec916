"""RMSNorm of query or key heads and rotary position embedding (RoPE, https://arxiv.org/abs/2104.09864)."""

from megabagel_kernels.qk_norm_rope.functional import apply_rope, qk_norm_rope

__all__ = ["apply_rope", "qk_norm_rope"]
