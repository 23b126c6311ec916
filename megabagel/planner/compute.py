"""Seconds of the arithmetic of one micro-batch on one rank: GEMMs, attention, element-wise passes, codec.

Forward of a linear [R, i] x [i, o] is 2 R i o operations, backward twice that. A GEMM reaches `calibration.gemm` of the
peak times a factor that falls with its smallest dimensions. Element-wise kernels take their bytes over the bandwidth.
"""

from dataclasses import dataclass

from megabagel.planner.calibration import Calibration
from megabagel.planner.scenario import Case

KERNELS_PER_LAYER = 70
"""Launches of a layer's forward (both experts); backward has twice as many."""
UNFUSED = 4
"""Memory traffic of norms, rotation and SwiGLU as several torch operations with fp32 between them, over one kernel's.
Fitted: torchtitan without torch.compile."""


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
        """Both."""
        return self.forward + self.backward


def gemm(case: Case, constants: Calibration, rows: float, inputs: float, outputs: float) -> Passes:
    """One linear: forward, and both products of backward."""
    if rows <= 0:
        return Passes()
    fill = 1.0
    for side in (rows, inputs, outputs):
        fill /= 1 + constants.gemm_half / side
    seconds = 2 * rows * inputs * outputs / (case.gpu.peak(case.grid.precision) * constants.gemm * fill)
    return Passes(seconds, 2 * seconds)


def flash(case: Case, constants: Calibration, pairs: float, channels: float) -> Passes:
    """Attention over visible pairs: 4 operations per pair and channel forward, 10 backward (FlashAttention-2, 3.1)."""
    seconds = 4 * pairs * channels / (case.gpu.peak(case.grid.precision) * constants.attention)
    return Passes(seconds, 2.5 * seconds)


def passes_over(case: Case, constants: Calibration, numbers: float) -> Passes:
    """Element-wise kernels that read and write `numbers` numbers forward, twice as many backward."""
    numbers *= 1 if case.system.fused else UNFUSED
    seconds = numbers * case.bytes / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
    return Passes(seconds, 2 * seconds)


def layer(case: Case, constants: Calibration) -> dict[str, Passes]:
    """One decoder layer by kind of work. Each expert's rows are a GEMM of their own."""
    model, load, rows = case.config.model, case.load, case.load.rows
    linears = Passes()
    for part in (load.rows_und, load.rows_gen) if model.variant == "mot" else (rows,):
        linears += gemm(case, constants, part, model.hidden, case.q + 2 * case.k)
        linears += gemm(case, constants, part, case.q, model.hidden)
    for part in (load.rows_und, load.rows_gen) if model.variant != "dense" else (rows,):
        linears += gemm(case, constants, part, model.hidden, 2 * case.ffn)
        linears += gemm(case, constants, part, case.ffn, model.hidden)
    # Norms read and write, residuals read two and write one: 10 h. QK-norm, rotation and the join of both experts read
    # and write q and k, SwiGLU reads 2 f and writes f.
    heads = (case.q + case.k) * (2 * model.qk_norm + 2 + 2 * (model.variant == "mot"))
    elementwise = passes_over(case, constants, 10 * case.split_rows * model.hidden + rows * (heads + 3 * case.ffn))
    return {
        "linears": linears,
        "attention": flash(case, constants, load.pairs, case.q) * case.imbalance,
        "element-wise": elementwise,
    }


def with_recompute(case: Case, constants: Calibration) -> dict[str, Passes]:
    """A layer in the grid's mode: what is recomputed runs forward once more in backward; launches bound it below."""
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
    """Tower and connector on this rank's patches; forward and backward, never recomputed."""
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
    """Word head on rows with cross-entropy: the GEMM, forward once more in backward where it is sliced, and five passes
    over fp32 logits."""
    model, rows = case.config.model, case.load.ce_rows
    words = model.vocab / case.grid.tp
    logits = rows * words * 4 * 5 / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
    again = gemm(case, constants, rows, model.hidden, words).forward * case.system.slices_words
    return gemm(case, constants, rows, model.hidden, words) + Passes(0.6 * logits, 0.4 * logits + again)


def encode(case: Case, constants: Calibration) -> float:
    """The codec on the images of one micro-batch that this rank encodes; forward alone, fp32 convolutions in TF32."""
    return case.load.vae_flops / (case.gpu.tf32_tflops * 1e12 * constants.convolution)


def optimizer(case: Case, constants: Calibration, numbers: float) -> float:
    """AdamW and averages on this rank's shard: fp32 weight, two moments and average read and written, gradient read
    twice (once for the norm), and the weight written in the type of the model."""
    per_number = 4 * (2 + 4 + 2 * bool(case.config.train.ema) + 2) + case.bytes
    return numbers / case.grid.replicas * per_number / (case.gpu.bandwidth_gb_s * 1e9 * constants.memory)
