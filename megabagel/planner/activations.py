"""Activation memory: bytes that the forward pass saves for backward, per micro-batch and rank.

The terms follow the tensors that each operation of `model.layers`, `model.vit`, `model.bagel` and megatron-core's
linears saves. They are those of Korthikanti et al., Reducing Activation Recomputation, section 4, for gated MLPs and
grouped queries, without dropout and without stored attention scores. The symbols are explained in `planner.scenario`.
tests/plan/test_memory.py compares the formulas with the tensors that torch saves.
"""

from functools import cache

from megabagel_kernels.linear_cross_entropy import SLICE_TOKENS

from megabagel.parallel.schedules import peak_in_flight, schedule
from megabagel.planner.scenario import Case

STATISTIC = 4
"""Bytes per row of a saved statistic (inverse RMS of a norm, log-sum-exp of attention): one fp32 number."""


def layer(case: Case, recompute: str) -> float:
    """Bytes saved by one decoder layer under a mode of recomputation.

    - none: inputs and outputs of both norms (4 r h), q/k/v before their norms, q, k, v and output of attention, and
      4 R f of the MLP (gate and up, silu of gate, product).
    - selective: attention and SwiGLU save only their inputs and outputs.
    - full: only the input of the layer.
    """
    b, rows, split = case.bytes, case.load.rows, case.split_rows
    model = case.config.model
    if recompute == "full":
        return split * model.hidden * b
    streams = 4 * split * model.hidden * b + 2 * split * STATISTIC
    projected = rows * ((case.q + 2 * case.k) * b + (case.q + case.k) / model.kv_channels * STATISTIC)
    return streams + projected * model.qk_norm + _attention(case, recompute) + _mlp(case, recompute)


def _attention(case: Case, recompute: str) -> float:
    b, rows = case.bytes, case.load.rows
    if recompute == "selective":
        return 2 * rows * (case.q + case.k) * b  # q, own k and v, output
    # The CPU engine works in an order of rows of its own, so its output is saved a second time in that order.
    copies = 3 if case.system.engine == "host" else 2  # q, output, (CPU) output in the engine's order
    gathered = 2 * case.load.keys * case.k
    return (copies * rows * case.q + gathered) * b + rows * case.q / case.config.model.kv_channels * STATISTIC


def _mlp(case: Case, recompute: str) -> float:
    """Gate and up (2), their product (1), and silu(gate) (1) unless backward recomputes it, each [R, f]."""
    return (3 if recompute == "selective" or case.system.fused else 4) * case.load.rows * case.ffn * case.bytes


def layers(case: Case, count: float) -> float:
    """Bytes saved by `count` decoder layers in the grid's mode of recomputation."""
    full = case.full_layers
    other = "none" if case.grid.recompute == "full" else case.grid.recompute
    return count * (full * layer(case, "full") + (1 - full) * layer(case, other))


def embed(case: Case) -> float:
    """Bytes saved by the inputs of the model: ViT, connector and latents.

    The ViT is never recomputed. For P patches and ViT width E, a ViT layer saves 4 P E (inputs and outputs of its
    norms), q, k, v and output (4 P E / tp) and both sides of GELU (2 P F / tp); the connector saves its input and both
    sides of GELU.
    """
    model, load, b = case.config.model, case.load, case.bytes
    vit, shards = model.vit, case.vit_shards
    total = 0.0
    if model.visual_und:
        copies = 5 if case.system.engine == "host" else 4
        one = 4 * vit.hidden + copies * vit.hidden / shards + 2 * vit.ffn / shards
        connector = vit.hidden + 2 * model.hidden / case.grid.tp
        total += max(load.vit_patches, 1.0) * (vit.layers * one + connector + 2 * vit.hidden) * b
    # Under sequence parallelism this rank's und rows are a view into all of them, which keeps the whole tensor alive.
    if case.split_rows < load.rows:
        total += load.rows_und * model.hidden * b
    if model.visual_gen:
        total += load.rows_gen * case.split_rows / load.rows * model.latent_dim * b
    return total


def carried(case: Case) -> float:
    """Bytes that a later stage receives beside hidden states: the flow target, on its way to the last stage.

    It is held twice: inside the received payload and as a copy of its own (`parallel.stage_activations`).
    """
    target = (case.config.model.latent_dim + 1) * 4
    return case.split_rows * (1 + case.load.rows_gen / case.load.rows) * target


def heads(case: Case) -> float:
    """Bytes saved by the final norms and both heads, without the logits.

    These are the norm inputs (r h), the inputs of llm2vae and of the LM head, and velocities with their targets (fp32).
    """
    model, load, b = case.config.model, case.load, case.bytes
    gen = load.rows_gen * case.split_rows / load.rows
    flow = gen * (model.hidden * b + 2 * model.latent_dim * 4) if model.visual_gen else 0.0
    return (case.split_rows * model.hidden + load.ce_rows * model.hidden) * b + flow


def logits_kept(case: Case) -> float:
    """Bytes of the fp32 softmax over this rank's vocabulary that the cross-entropy saves: CE rows x V / tp.

    0 where the LM head computes logits in slices of the vocabulary, which are dropped after use.
    """
    return 0.0 if case.system.slices_words else case.load.ce_rows * case.config.model.vocab / case.grid.tp * 4


def logits_peak(case: Case) -> float:
    """Peak bytes of the logits: the fp32 softmax, and logits and their gradient in the model's dtype.

    Where the LM head works in slices of the vocabulary: logits and gradient of one slice.
    """
    if case.system.slices_words:
        words = min(SLICE_TOKENS, case.config.model.vocab / case.grid.tp)
        return case.load.ce_rows * words * 2 * case.bytes
    return logits_kept(case) * (1 + 2 * case.bytes / 4)


def in_flight(case: Case, rank: int) -> list[int]:
    """Micro-batches per model chunk of a pipeline rank whose activations are alive at the rank's peak."""
    return _in_flight(rank, case.grid.pp, case.grid.vpp, case.micro_batches)


# Cached on the four integers because a search visits many grids with the same pipeline.
@cache
def _in_flight(rank: int, pp: int, vpp: int, micro_batches: int) -> list[int]:
    if vpp > 1 and micro_batches < pp:  # refused for a run, but asked for by who compares a single micro-batch
        return [micro_batches] * vpp
    return peak_in_flight(schedule(rank, pp, vpp, micro_batches), vpp)


def kept(case: Case, rank: int) -> float:
    """Bytes of all activations that a pipeline rank holds at its peak, without logits."""
    total = 0.0
    for chunk, (count, alive) in enumerate(zip(case.chunks[rank], in_flight(case, rank), strict=True)):
        first, last = case.ends(rank, chunk)
        one = layers(case, count) + (embed(case) if first else carried(case)) + (heads(case) if last else 0)
        total += alive * one
    return total


def workspace(case: Case) -> float:
    """Bytes needed on top of saved activations while one layer's backward runs.

    These are the activations that it recomputes and the gradients in its MLP (3 R f + R h). Recomputed activations
    count only where all layers are recomputed: otherwise the last layers are not, and by the time that backward reaches
    a recomputed layer, they have freed more than it needs.
    """
    gradients = case.load.rows * (3 * case.ffn + case.config.model.hidden) * case.bytes
    return gradients + (layer(case, "none") if case.full_layers == 1 else 0.0)
