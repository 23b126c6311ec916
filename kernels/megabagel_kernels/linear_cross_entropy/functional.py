"""Cross-entropy of linear logits over a large vocabulary, which may be split over tensor-parallel ranks.

Letters: Q rows with cross-entropy, D width, V vocabulary (of this rank).
"""

from torch import Tensor

from megabagel_kernels.checks import (
    ANY_FLOAT,
    FLOATS,
    INTEGERS,
    Engine,
    check_axes,
    check_device,
    check_dtype,
    check_engine,
    check_shape,
)
from megabagel_kernels.linear_cross_entropy.slices import (
    SLICE_TOKENS,
    WHOLE,
    SlicePasses,
    VocabShard,
    sliced_cross_entropy,
)
from megabagel_kernels.linear_cross_entropy.torch import TorchPasses


def linear_cross_entropy(
    hidden_QD: Tensor,
    weight_VD: Tensor,
    label_Q: Tensor,
    *,
    ignore: int = -100,
    shard: VocabShard = WHOLE,
    engine: Engine = "torch",
    slice_tokens: int = SLICE_TOKENS,
) -> Tensor:
    """Cross-entropy of each row, without the full logits in memory.

    Logits have the dtype of the inputs, the log-sum-exp is fp32 (fp64 for fp64).

    Args:
        hidden_QD: [Q, D] hidden states.
        weight_VD: [V, D] head, or this rank's rows of it.
        label_Q: [Q] token ids of the whole vocabulary. Ids that no rank holds are not detected.
        ignore: label of rows without loss.
        shard: this rank's part of the vocabulary. All ranks get equal losses; the gradient of `hidden_QD` is this
            rank's part of a sum over ranks.
        engine: "torch" or "triton" for the passes over the logits; the GEMMs are torch's.
        slice_tokens: vocabulary entries whose logits are in memory at once.

    Returns:
        [Q] fp32 (fp64 for fp64), 0 and without gradient where the label is `ignore`.

    Raises:
        ValueError: arguments do not fit each other or the engine.
    """
    check_axes("hidden_QD", hidden_QD, "Q, D")
    check_axes("weight_VD", weight_VD, "V, D")
    check_shape("weight_VD", weight_VD, (weight_VD.shape[0], hidden_QD.shape[1]))
    check_dtype("hidden_QD", hidden_QD, *(ANY_FLOAT if engine == "torch" else FLOATS))
    check_dtype("weight_VD", weight_VD, hidden_QD.dtype)
    check_shape("label_Q", label_Q, hidden_QD.shape[:1])
    check_dtype("label_Q", label_Q, *INTEGERS)
    check_device(hidden_QD, weight_VD=weight_VD, label_Q=label_Q)
    if slice_tokens < 1:
        raise ValueError(f"slice_tokens is {slice_tokens}, expected at least 1")
    return sliced_cross_entropy(hidden_QD, weight_VD, label_Q, ignore, shard, _passes(engine), slice_tokens)


def _passes(engine: Engine) -> SlicePasses:
    check_engine(engine)
    if engine == "torch":
        return TorchPasses()
    from megabagel_kernels.linear_cross_entropy.triton import TritonPasses

    return TritonPasses()
