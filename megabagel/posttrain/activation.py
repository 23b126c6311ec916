"""Average activation strength of neuron clusters (SRUM appendix C, algorithm 1, equations 4 and 5).

a_i(x) is the activation of neuron i of an MLP, meaned over the tokens of sample x. Arrays are [samples, neurons].
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Clusters:
    """Neurons of the base model that are active above a threshold and more so in one kind of task than in the other."""

    threshold: float
    und: np.ndarray
    """int64 indices of the understanding cluster."""
    gen: np.ndarray


def clusters(und_mean: np.ndarray, gen_mean: np.ndarray, percentile: float) -> Clusters:
    """Clusters of a base model. A neuron with equal means belongs to neither.

    Args:
        und_mean: mean activation of each neuron over the samples of the understanding tasks.
        gen_mean: the same over those of the generation tasks.
        percentile: tau_act of algorithm 1, from 0 to 100; the paper gives no value.
    """
    largest = np.maximum(und_mean, gen_mean)
    threshold = float(np.percentile(largest, percentile))
    active = largest >= threshold
    return Clusters(
        threshold, np.flatnonzero(active & (und_mean > gen_mean)), np.flatnonzero(active & (gen_mean > und_mean))
    )


def strength(activations: np.ndarray, cluster: np.ndarray) -> float:
    """S_final: mean over samples of the mean over a cluster; NaN for an empty cluster."""
    return float(activations[:, cluster].mean(1).mean()) if len(cluster) else float("nan")
