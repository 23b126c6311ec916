"""What the formulas are about: one run on one grid of one kind of GPU, by one training system.

Legend used in all formulas: h hidden width, f MLP width, V vocabulary; q and k query and key/value channels of this
tensor-parallel rank; R rows of this context-parallel rank, r its share under sequence parallelism; b bytes per number.
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
    """How a training system treats weights and communication. The planner is about ours; the others carry the published
    measurements that the model is checked against."""

    name: str
    shards_weights: bool = False
    """Weights and gradients are sharded over data-parallel ranks too and gathered layer by layer (FSDP, ZeRO-3)."""
    overlaps_data: bool = False
    """Gradients are reduced and weights gathered beside the backward and forward pass."""
    overlaps_tensor: bool = False
    """Tensor-parallel collectives run beside the GEMMs that feed on them, piece by piece."""
    recomputed_layers: int | None = None
    """Layers under full recomputation; None: all that have it."""
    fused: bool = False
    """Norms, rotation and SwiGLU are one kernel each, and SwiGLU keeps its input alone."""
    slices_words: bool = False
    """The word head makes logits slice by slice and drops them, and makes them again in backward."""
    engine: str = "flash"
    """Attention: `flash` on a GPU; `host`, whose outputs are kept in a second order as well, on a CPU."""


OURS = System("megabagel", fused=True, slices_words=True)
"""On a GPU, as `train.optimizer` and `parallel.linears` set megatron-core up: nothing is overlapped but what its
backward of column-parallel linears does by itself."""


def our_system(config: Config) -> System:
    """Ours with the kernels that `parallel.kernels` asks for."""
    fused = config.parallel.kernels != "torch"
    return replace(OURS, fused=fused, slices_words=fused)


@dataclass(frozen=True)
class Case:
    """Everything that memory and time follow from. `config` is on the grid already."""

    config: Config
    grid: Grid
    load: Load
    gpu: Gpu
    system: System = OURS
    imbalance: float = 1.0

    @property
    def micro_batches(self) -> int:
        """Of one rank in one step."""
        return self.config.train.packs_per_step // self.grid.dp

    @property
    def bytes(self) -> int:
        """b: bytes of a weight or an activation."""
        return 2 if self.grid.precision == "bf16" else 4

    @property
    def split_rows(self) -> float:
        """r: rows between the linears."""
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
        """Ways that the ViT tower is split (`model.vit.splits`)."""
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
        """Whether a chunk holds the inputs, and the heads, of the model."""
        return (rank, chunk) == (0, 0), (rank, chunk) == (self.grid.pp - 1, self.grid.vpp - 1)

    @property
    def full_layers(self) -> float:
        """Share of a stage's layers that are recomputed as a whole."""
        if self.grid.recompute != "full":
            return 0.0
        some = self.system.recomputed_layers
        return 1.0 if some is None else some / self.config.model.layers
