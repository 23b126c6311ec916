"""Inputs of the planner's formulas: one run on one grid of one kind of GPU, by one training system.

Symbols in all formulas: h hidden width, f MLP width, V vocabulary; q and k query and key/value channels of this
tensor-parallel rank; R rows of this context-parallel rank, r its share under sequence parallelism; b bytes per number.
They follow the papers that the formulas come from, not docs/notation.md.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from megabagel.config.schema import Config
from megabagel.planner.grid import Grid
from megabagel.planner.hardware import Gpu
from megabagel.planner.parameters import Parts, count_parts
from megabagel.planner.workload import Load


@dataclass(frozen=True)
class System:
    """How a training system shards weights and overlaps communication.

    Plans are made for `OURS`. Other systems describe published measurements, against which the model is checked.
    """

    name: str
    shards_weights: bool = False
    """Weights and gradients are sharded over data-parallel ranks too and gathered layer by layer (FSDP, ZeRO-3)."""
    overlaps_data: bool = False
    """Gradient reduction and weight gathering overlap with the backward and forward pass."""
    overlaps_tensor: bool = False
    """Tensor-parallel collectives are split into pieces that overlap with the GEMMs that use their results."""
    recomputed_layers: int | None = None
    """Layers that are recomputed under full recomputation; None: all."""
    fused: bool = False
    """Norms, RoPE and SwiGLU are one kernel each, and SwiGLU saves only its input."""
    slices_words: bool = False
    """The LM head computes logits in slices of the vocabulary, drops them and recomputes them in backward."""
    engine: str = "flash"
    """Attention engine: `flash` on a GPU; `host` on a CPU, which saves its output in a second order of rows as well."""


OURS = System("megabagel", fused=True, slices_words=True)
"""This project on a GPU, as `train.optimizer` and `parallel.linears` configure megatron-core: the only overlap is the
one built into its backward of column-parallel linears."""


def our_system(config: Config) -> System:
    """This project's system with the kernels that `parallel.kernels` names."""
    fused = config.parallel.kernels != "torch"
    return replace(OURS, fused=fused, slices_words=fused)


@dataclass(frozen=True)
class Case:
    """All inputs of the memory and time formulas. `config` already has the grid's parallel sizes."""

    config: Config
    grid: Grid
    load: Load
    gpu: Gpu
    system: System = OURS
    imbalance: float = 1.0

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank in one step."""
        return self.config.train.packs_per_step // self.grid.dp

    @property
    def bytes(self) -> int:
        """b: bytes of a weight or an activation."""
        return 2 if self.grid.precision == "bf16" else 4

    @property
    def split_rows(self) -> float:
        """r: rows between the linears, split over tensor-parallel ranks under sequence parallelism."""
        return self.load.rows / self.config.parallel.row_shards

    @property
    def q(self) -> float:
        """Query channels of this rank."""
        return self.config.model.heads * self.config.model.kv_channels / self.grid.tp

    @property
    def k(self) -> float:
        """Key channels of this rank; values have as many."""
        return self.config.model.kv_heads * self.config.model.kv_channels / self.grid.tp

    @property
    def ffn(self) -> float:
        """MLP channels of this rank."""
        return self.config.model.ffn / self.grid.tp

    @property
    def vit_shards(self) -> int:
        """Tensor-parallel ranks that the ViT is split over; 1 if it is replicated (`model.vit.splits`)."""
        vit, tp = self.config.model.vit, self.grid.tp
        return tp if vit.heads % tp == 0 and vit.ffn % tp == 0 else 1

    @cached_property
    def parts(self) -> Parts:
        """Weights of one rank, by piece of the model."""
        return count_parts(self.config.model, self.grid.tp, self.config.train.freeze)

    @cached_property
    def chunks(self) -> list[list[int]]:
        """Layers of every model chunk of every pipeline rank: [pp][vpp] (as `parallel.stages.layer_split`)."""
        stages, layers = self.grid.pp * self.grid.vpp, self.config.model.layers
        split = self.config.parallel.layer_split or [(layers + stages - 1 - s) // stages for s in range(stages)]
        return [[split[chunk * self.grid.pp + rank] for chunk in range(self.grid.vpp)] for rank in range(self.grid.pp)]

    def ends(self, rank: int, chunk: int) -> tuple[bool, bool]:
        """Whether a model chunk holds the embeddings, and whether it holds the heads."""
        return (rank, chunk) == (0, 0), (rank, chunk) == (self.grid.pp - 1, self.grid.vpp - 1)

    @property
    def full_layers(self) -> float:
        """Share of the layers that are under full recomputation."""
        if self.grid.recompute != "full":
            return 0.0
        some = self.system.recomputed_layers
        return 1.0 if some is None else some / self.config.model.layers
