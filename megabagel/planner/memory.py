"""Memory model: bytes of a rank by category, and the rank with the most.

Bytes per parameter follow Rajbhandari et al., ZeRO, section 3, with megatron-core's distributed optimizer: every rank
holds the weight and an fp32 gradient; an fp32 copy of the weight (bf16 runs only), two moments and the averaged weight
are sharded over all ranks with the same weights.
"""

from dataclasses import dataclass

import torch

from megabagel.parallel.stage_activations import wire_width
from megabagel.planner import activations
from megabagel.planner.parameters import Numbers, codec_numbers, count_parts
from megabagel.planner.scenario import Case

GIB = 2**30

RUNTIME = 2.0 * GIB
"""CUDA context, NCCL channels, cuBLAS workspaces and compiled kernels. An assumption."""
FRAGMENTATION = 0.05
"""Share of `DYNAMIC` memory that the allocator holds but cannot use. An assumption."""
DYNAMIC = ("activations", "logits", "workspace", "codec", "communication")


@dataclass(frozen=True)
class Memory:
    """Bytes of one pipeline rank by category."""

    rank: int
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all categories."""
        return sum(self.parts.values())

    @property
    def gib(self) -> float:
        """Total in GiB."""
        return self.total / GIB


def stage_numbers(case: Case, rank: int) -> Numbers:
    """Parameter counts of all model chunks of a pipeline rank."""
    total = Numbers()
    for chunk, layers in enumerate(case.chunks[rank]):
        total += case.parts.stage(layers, *case.ends(rank, chunk))
    return total


def state(case: Case, rank: int) -> dict[str, float]:
    """Bytes that do not depend on the batch, by category: weights, gradients, optimizer, EMA, tables."""
    numbers, shards, b = stage_numbers(case, rank), case.grid.replicas, case.bytes
    per_number = {
        "weights": b * numbers.weights,
        "gradients": 4 * numbers.learning,
        "optimizer": (12 if b == 2 else 8) * numbers.learning / shards,  # fp32 runs have no second copy of the weights
        "ema": 4 * numbers.learning / shards if case.config.train.ema else 0,
        "tables": 4 * numbers.tables,
    }
    if case.system.shards_weights:
        # FSDP holds two gathered layers: the one that computes and the one that is prefetched.
        gathered = 2 * case.parts.layer.weights
        per_number["weights"] = b * (numbers.weights / shards + gathered)
        per_number["gradients"] = 4 * (numbers.learning / shards + case.parts.layer.learning)
    return per_number


def stage_memory(case: Case, rank: int) -> Memory:
    """Peak memory of one pipeline rank by category."""
    first, last = rank == 0, rank == case.grid.pp - 1
    parts = {
        **state(case, rank),
        "activations": activations.kept(case, rank),
        "logits": activations.logits_peak(case) if last else 0.0,
        "workspace": activations.workspace(case),
        "inputs": inputs(case, first),
        "codec": codec(case, first),
        "communication": communication(case),
    }
    parts["runtime"] = RUNTIME
    parts["fragmentation"] = FRAGMENTATION * sum(parts[name] for name in DYNAMIC)
    return Memory(rank, parts)


def peak(case: Case) -> Memory:
    """Memory of the pipeline rank that needs the most."""
    return max((stage_memory(case, rank) for rank in range(case.grid.pp)), key=lambda memory: memory.total)


def inputs(case: Case, first: bool) -> float:
    """Bytes of a step's inputs: all its micro-batches, because they are built before the first one runs.

    Every rank holds two RoPE tables (rows x head channels, fp32) per micro-batch; the first stage also holds patches,
    noised latents and flow targets.
    """
    rope = 2 * case.load.rows * case.config.model.kv_channels
    return 4 * case.micro_batches * (rope + (case.load.inputs if first else 0))


def codec(case: Case, encodes: bool) -> float:
    """Bytes of the autoencoder: fp32 weights, and where it encodes, 4 fp32 feature maps of `width` channels per pixel.

    These are its widest maps, at full resolution.
    """
    maps = 4 * case.config.model.vae.width * case.load.largest_image * 4
    return 4 * codec_numbers(case.config.model) + (maps if encodes and codec_numbers(case.config.model) else 0)


def communication(case: Case) -> float:
    """Bytes of communication buffers.

    These are the gathered rows of sequence parallelism (2 R h), gathered K and V with their gradients, and 4 buffers of
    stage activations.
    """
    b, rows, model = case.bytes, case.load.rows, case.config.model
    gathered = 2 * rows * model.hidden * b if case.config.parallel.row_shards > 1 else 0
    keys = 4 * case.load.keys * case.k * b if case.grid.cp > 1 else 0
    width = wire_width(model, torch.bfloat16 if b == 2 else torch.float32, case.config.two_targets)
    wire = 4 * case.split_rows * width * b if case.grid.pp > 1 else 0
    return gathered + keys + wire


def host_memory(case: Case) -> float:
    """Bytes of CPU memory per GPU: torch and libraries (6 GiB), prefetched batches, and shards being written to disk.

    Nothing scales with the whole model: weights are built, loaded and saved in shards, and a fresh start initializes
    one whole tensor at a time.
    """
    data = case.config.data
    batch = 4 * case.load.inputs * case.micro_batches * (data.prefetch + (1 if data.workers else 2))
    numbers = max((stage_numbers(case, rank) for rank in range(case.grid.pp)), key=lambda n: n.learning)
    return 6 * GIB + batch + 16 * numbers.learning / case.grid.replicas


def checkpoint_bytes(case: Case) -> float:
    """Bytes of one checkpoint on disk: fp32 weights, two moments and averages of the whole model, each stored once."""
    config = case.config
    whole = count_parts(config.model, 1, config.train.freeze).stage(config.model.layers, True, True)
    return (16 if config.train.ema else 12) * whole.learning + case.bytes * whole.frozen
