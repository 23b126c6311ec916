"""Definition of linear cross-entropy, with all logits in memory.

Letters: Q rows with cross-entropy, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional


def linear_cross_entropy(hidden_QD: Tensor, weight_VD: Tensor, label_Q: Tensor, ignore: int = -100) -> Tensor:
    """Cross-entropy per row [Q] of logits hidden @ weight^T, 0 where the label is `ignore`.

    Logits have the dtype of the inputs; the log-sum-exp is fp32 (fp64 for fp64), as torch and megatron-core compute it.
    """
    logits_QV = functional.linear(hidden_QD, weight_VD)
    wide = torch.promote_types(logits_QV.dtype, torch.float32)
    return functional.cross_entropy(logits_QV.to(wide), label_Q, reduction="none", ignore_index=ignore)
