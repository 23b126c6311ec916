"""The passes over a slice of logits in plain torch, for every device and dtype.

Letters: Q rows with cross-entropy, v tokens of one slice of the vocabulary.
"""

import torch
from torch import Tensor


class TorchPasses:
    """See `slices.SlicePasses`."""

    def accumulate_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, target_Q: Tensor) -> None:
        """See `slices.SlicePasses`."""
        wide_Qv = logits_Qv.to(lse_Q.dtype)
        torch.logaddexp(lse_Q, wide_Qv.logsumexp(1), out=lse_Q)
        column_Q1, inside_Q = _label_column(logits_Qv, label_Q)
        target_Q += torch.where(inside_Q, wide_Qv.gather(1, column_Q1)[:, 0], 0)

    def gradient_(self, logits_Qv: Tensor, label_Q: Tensor, lse_Q: Tensor, dloss_Q: Tensor) -> None:
        """See `slices.SlicePasses`."""
        dlogits_Qv = (logits_Qv - lse_Q[:, None]).exp_().mul_(dloss_Q[:, None])
        column_Q1, inside_Q = _label_column(logits_Qv, label_Q)
        dlogits_Qv.scatter_add_(1, column_Q1, torch.where(inside_Q, -dloss_Q, 0)[:, None])
        logits_Qv.copy_(dlogits_Qv)


def _label_column(logits_Qv: Tensor, label_Q: Tensor) -> tuple[Tensor, Tensor]:
    """(column of the label [Q, 1], whether the label is in this slice [Q]); any column where it is not."""
    tokens = logits_Qv.shape[1]
    return label_Q.clamp(0, tokens - 1).long()[:, None], (label_Q >= 0) & (label_Q < tokens)
