"""Language-model head and cross-entropy in one operation that never holds all logits (see `slices`)."""

from megabagel_kernels.linear_cross_entropy.functional import linear_cross_entropy
from megabagel_kernels.linear_cross_entropy.slices import SLICE_TOKENS, WHOLE, VocabShard

__all__ = ["SLICE_TOKENS", "WHOLE", "VocabShard", "linear_cross_entropy"]
