"""Compute model: seconds of one micro-batch on one rank for GEMMs, attention, element-wise kernels and the autoencoder.

The forward of a linear [R, i] x [i, o] takes 2 R i o FLOPs, the backward twice that. A GEMM reaches the share
`Calibration.gemm` of the peak, times a factor per dimension that falls for small ones. Element-wise kernels are bound
by memory: bytes over bandwidth. The symbols are explained in `planner.scenario`.
"""

from dataclasses import dataclass

from megabagel.planner.calibration import Calibration
from megabagel.planner.scenario import Case

KERNELS_PER_LAYER = 70
"""Kernel launches in a layer's forward (both experts); backward has twice as many."""
UNFUSED = 4
"""Memory traffic of norms, RoPE and SwiGLU as several torch operations with fp32 intermediates, relative to one fused
kernel. Fitted on torchtitan without torch.compile."""


@dataclass(frozen=True)
class Passes:
    """Seconds of forward and backward, without communication."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> "Passes":
        return Passes(self.forward * times, self.backward * times)

    @property
    def total(self) -> float:
        """Seconds of forward and backward together."""
        return self.forward + self.backward


def gemm(case: Case, constants: Calibration, rows: float, inputs: float, outputs: float) -> Passes:
    """Seconds of one linear [rows, inputs] x [inputs, outputs]: forward, and both GEMMs of backward.

    Args:
        case: the run on its grid; gives peak and precision.
        constants: shares of the peak that GEMMs reach.
        rows: rows on this rank; 0 takes no time.
        inputs: input channels on this rank.
        outputs: output channels on this rank.
    """
    if rows <= 0:
        return Passes()
    fill = 1.0
    for side in (rows, inputs, outputs):
        fill /= 1 + constants.gemm_half / side
    seconds = 2 * rows * inputs * outputs / (case.gpu.peak(case.grid.precision) * constants.gemm * fill)
    return Passes(seconds, 2 * seconds)


def flash(case: Case, constants: Calibration, pairs: float, channels: float) -> Passes:
    """Seconds of attention: 4 FLOPs per visible pair and channel forward, 10 backward (FlashAttention-2, section 3.1).

    Args:
        case: the run on its grid; gives peak and precision.
        constants: share of the peak that attention reaches.
        pairs: (query, key) pairs that the mask lets through.
        channels: query heads of this rank times head channels.
    """
    seconds = 4 * pairs * channels / (case.gpu.peak(case.grid.precision) * constants.attention)
    return Passes(seconds, 2.5 * seconds)


def passes_over(case: Case, constants: Calibration, numbers: float) -> Passes:
    """Seconds of element-wise kernels that read and write `numbers` numbers forward, twice as many backward."""
    numbers *= 1 if case.system.fused else UNFUSED
    seconds = numbers * case.bytes / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
    return Passes(seconds, 2 * seconds)


def layer(case: Case, constants: Calibration) -> dict[str, Passes]:
    """Seconds of one decoder layer by kind of work, without recomputation. Each expert's rows are a separate GEMM."""
    model, load, rows = case.config.model, case.load, case.load.rows
    linears = Passes()
    for part in (load.rows_und, load.rows_gen) if model.variant == "mot" else (rows,):
        linears += gemm(case, constants, part, model.hidden, case.q + 2 * case.k)
        linears += gemm(case, constants, part, case.q, model.hidden)
    for part in (load.rows_und, load.rows_gen) if model.variant != "dense" else (rows,):
        linears += gemm(case, constants, part, model.hidden, 2 * case.ffn)
        linears += gemm(case, constants, part, case.ffn, model.hidden)
    # Per row: two norms read and write h, two residual additions read 2 h and write h, together 10 h. QK-norm, RoPE and
    # the join of both experts each read and write q and k. SwiGLU reads 2 f and writes f.
    heads = (case.q + case.k) * (2 * model.qk_norm + 2 + 2 * (model.variant == "mot"))
    elementwise = passes_over(case, constants, 10 * case.split_rows * model.hidden + rows * (heads + 3 * case.ffn))
    return {
        "linears": linears,
        "attention": flash(case, constants, load.pairs, case.q) * case.imbalance,
        "element-wise": elementwise,
    }


def with_recompute(case: Case, constants: Calibration) -> dict[str, Passes]:
    """Seconds of one decoder layer in the grid's mode of recomputation, by kind of work.

    Recomputed operations run their forward once more in backward. Where the GPU's work takes less time than launching
    the kernels from Python, the difference is listed as `launches`.
    """
    parts = layer(case, constants)
    if case.grid.recompute == "full":
        again = sum(part.forward for part in parts.values()) * case.full_layers
    elif case.grid.recompute == "selective":
        again = parts["attention"].forward + parts["element-wise"].forward / 3
    else:
        again = 0.0
    parts["recomputation"] = Passes(0.0, again)
    launches = KERNELS_PER_LAYER * constants.launch
    shortest = {"forward": launches, "backward": (2 + case.full_layers) * launches}
    busy = {"forward": sum(p.forward for p in parts.values()), "backward": sum(p.backward for p in parts.values())}
    idle = {name: max(0.0, shortest[name] - busy[name]) for name in busy}
    parts["launches"] = Passes(idle["forward"], idle["backward"])
    return parts


def vit(case: Case, constants: Calibration) -> Passes:
    """Seconds of ViT and connector on this rank's patches; they are never recomputed."""
    model, load = case.config.model, case.load
    if not model.visual_und or not load.vit_patches:
        return Passes()
    tower, shards, patches = model.vit, case.vit_shards, load.vit_patches
    one = gemm(case, constants, patches, tower.hidden, 3 * tower.hidden / shards)
    one += gemm(case, constants, patches, tower.hidden / shards, tower.hidden)
    one += gemm(case, constants, patches, tower.hidden, tower.ffn / shards)
    one += gemm(case, constants, patches, tower.ffn / shards, tower.hidden)
    one += flash(case, constants, load.vit_pairs, tower.hidden / shards)
    one += passes_over(case, constants, patches * (10 * tower.hidden + 2 * tower.ffn / shards))
    connector = gemm(case, constants, patches, tower.hidden, model.hidden / case.grid.tp)
    connector += gemm(case, constants, patches, model.hidden / case.grid.tp, model.hidden)
    return one * tower.layers + connector


def head(case: Case, constants: Calibration) -> Passes:
    """Seconds of the LM head on rows with cross-entropy: the GEMM, and five passes over fp32 logits.

    Where logits are computed in slices of the vocabulary, backward repeats the forward GEMM.
    """
    model, rows = case.config.model, case.load.ce_rows
    words = model.vocab / case.grid.tp
    logits = rows * words * 4 * 5 / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
    again = gemm(case, constants, rows, model.hidden, words).forward * case.system.slices_words
    return gemm(case, constants, rows, model.hidden, words) + Passes(0.6 * logits, 0.4 * logits + again)


def encode(case: Case, constants: Calibration) -> float:
    """Seconds to encode this rank's images of one micro-batch: forward only, fp32 convolutions in TF32."""
    return case.load.vae_flops / (case.gpu.tf32_tflops * 1e12 * constants.convolution)


def optimizer(case: Case, constants: Calibration, numbers: float) -> float:
    """Seconds of AdamW and EMA on this rank's shard, bound by memory.

    The fp32 weight, two moments and the average are read and written, the gradient is read twice (once for the norm),
    and the weight is written in the model's dtype.
    """
    per_number = 4 * (2 + 4 + 2 * bool(case.config.train.ema) + 2) + case.bytes
    return numbers / case.grid.replicas * per_number / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
