"""What forward keeps for backward, bytes of one micro-batch on one rank.

Read off `model.layers`, `model.vit`, `model.bagel` and megatron-core's linears: which tensor each operation saves.
The terms are those of Korthikanti et al., Reducing Activation Recomputation, section 4, for gated MLPs and grouped
queries, without dropout and without stored attention scores. tests/plan/test_memory.py compares them with what torch
really keeps.
"""

from functools import cache

from megabagel_kernels.linear_cross_entropy import SLICE_TOKENS

from megabagel.parallel.schedules import peak_in_flight, schedule
from megabagel.planner.scenario import Case

STATISTIC = 4
"""Bytes of a norm's scale and of a row's log-sum-exp: fp32."""


def layer(case: Case, recompute: str) -> float:
    """One decoder layer.

    none: both norms' inputs and outputs (4 r h), q/k/v before their norms, q and k and v of attention with its output,
    and 4 R f of the MLP (gate and up, silu of gate, product). selective: attention and SwiGLU keep their inputs and
    outputs alone. full: the layer's input.
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
    copies = 3 if case.system.engine == "host" else 2  # q, output, and the output in the engine's own order
    gathered = 2 * case.load.keys * case.k
    return (copies * rows * case.q + gathered) * b + rows * case.q / case.config.model.kv_channels * STATISTIC


def _mlp(case: Case, recompute: str) -> float:
    """Gate and up together, the product, and silu(gate) unless that is made again in backward."""
    return (3 if recompute == "selective" or case.system.fused else 4) * case.load.rows * case.ffn * case.bytes


def layers(case: Case, count: float) -> float:
    """`count` decoder layers in the grid's mode of recomputation."""
    full = case.full_layers
    other = "none" if case.grid.recompute == "full" else case.grid.recompute
    return count * (full * layer(case, "full") + (1 - full) * layer(case, other))


def embed(case: Case) -> float:
    """Inputs of the model: the ViT tower, which is never recomputed, connector and latents.

    A tower layer keeps 4 P E (inputs and outputs of its norms), q, k, v and output (4 P E / tp) and both sides of
    GELU (2 P F / tp); the connector its input and both sides of GELU.
    """
    model, load, b = case.config.model, case.load, case.bytes
    vit, shards = model.vit, case.vit_shards
    total = 0.0
    if model.visual_und:
        copies = 5 if case.system.engine == "host" else 4
        one = 4 * vit.hidden + copies * vit.hidden / shards + 2 * vit.ffn / shards
        connector = vit.hidden + 2 * model.hidden / case.grid.tp
        total += max(load.vit_patches, 1.0) * (vit.layers * one + connector + 2 * vit.hidden) * b
    if case.split_rows < load.rows:
        total += load.rows_und * model.hidden * b  # split rows are a view of all of them
    if model.visual_gen:
        total += load.rows_gen * case.split_rows / load.rows * model.latent_dim * b
    return total


def carried(case: Case) -> float:
    """What a stage receives beside hidden states: the flow target on its way to the last one, as part of the wire
    and as a copy of its own (`parallel.wire`)."""
    target = (case.config.model.latent_dim + 1) * 4
    return case.split_rows * (1 + case.load.rows_gen / case.load.rows) * target


def heads(case: Case) -> float:
    """Final norms and both heads, without the logits: norm inputs (r h), llm2vae's input, the word head's input, and
    velocities with their targets (fp32)."""
    model, load, b = case.config.model, case.load, case.bytes
    gen = load.rows_gen * case.split_rows / load.rows
    flow = gen * (model.hidden * b + 2 * model.latent_dim * 4) if model.visual_gen else 0.0
    return (case.split_rows * model.hidden + load.ce_rows * model.hidden) * b + flow


def logits_kept(case: Case) -> float:
    """The softmax over this rank's words, fp32, that the cross-entropy keeps: K V / tp; sliced, nothing of that
    size."""
    return 0.0 if case.system.slices_words else case.load.ce_rows * case.config.model.vocab / case.grid.tp * 4


def logits_peak(case: Case) -> float:
    """Most that the logits take at once: the softmax, and logits and their gradient in the type of the model;
    sliced, two such tensors of one slice."""
    if case.system.slices_words:
        words = min(SLICE_TOKENS, case.config.model.vocab / case.grid.tp)
        return case.load.ce_rows * words * 2 * case.bytes
    return logits_kept(case) * (1 + 2 * case.bytes / 4)


def in_flight(case: Case, rank: int) -> list[int]:
    """Micro-batches of each model chunk of a pipeline rank whose activations are alive at the peak."""
    return _in_flight(rank, case.grid.pp, case.grid.vpp, case.micro_batches)


@cache  # a search has many grids with the same pipeline
def _in_flight(rank: int, pp: int, vpp: int, micro_batches: int) -> list[int]:
    return peak_in_flight(schedule(rank, pp, vpp, micro_batches), vpp)


def kept(case: Case, rank: int) -> float:
    """All activations that a pipeline rank holds at its peak, logits aside."""
    total = 0.0
    for chunk, (count, alive) in enumerate(zip(case.chunks[rank], in_flight(case, rank), strict=True)):
        first, last = case.ends(rank, chunk)
        one = layers(case, count) + (embed(case) if first else carried(case)) + (heads(case) if last else 0)
        total += alive * one
    return total


def workspace(case: Case) -> float:
    """Beside them while one layer's backward runs: what it recomputes, and the gradients in its MLP (3 R f + R h).

    Where only some layers are recomputed, the last ones are not: their backward has freed more by then.
    """
    gradients = case.load.rows * (3 * case.ffn + case.config.model.hidden) * case.bytes
    return gradients + (layer(case, "none") if case.full_layers == 1 else 0.0)
