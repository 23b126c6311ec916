"""Attention plans of a batch, made where the batch is made: on a CPU, once for all layers, away from the training step.

A planner is plain data: the loader's worker holds a copy and hands on batches whose plans are ready. `InputBuilder`
makes them itself for batches that come without (samplers, parity).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megabagel_kernels.attention.mask import AttentionCodes

from megabagel.config.schema import Config
from megabagel.parallel.attention import AttentionEngine, vit_head
from megabagel.parallel.mesh import Mesh
from megabagel.sequence.batch import AttentionPlans, PackedBatch
from megabagel.sequence.images import shares, vit_images
from megabagel.sequence.items import Mode
from megabagel.sequence.pack import Pack, mask_codes
from megabagel.sequence.sample import Segment


@dataclass(frozen=True)
class VitShares:
    """How a pack's ViT patches lie on context-parallel ranks: as many rows on each, the last ones padding."""

    sizes: list[int]
    """Patches of every image, in token order."""
    dealt: list[list[int]]
    """Numbers of the images that each rank encodes."""
    rows: int
    """Of every rank: the largest share, so that ranks exchange equal shapes, and one at least, which keeps the tower in
    the graph of a pack without images."""

    @staticmethod
    def of(pack: Pack, ranks: int) -> "VitShares":
        """The deal that `Encoders.vit` makes, too."""
        sizes = [image.rows * image.cols for _, image in vit_images(pack)]
        dealt = shares(sizes, ranks)
        return VitShares(sizes, dealt, max(1, *(sum(sizes[i] for i in part) for part in dealt)))

    def padding(self, rank: int) -> int:
        """Rows of a rank that hold no patch."""
        return self.rows - sum(self.sizes[i] for i in self.dealt[rank])

    def codes(self, rank: int) -> AttentionCodes:
        """Full attention inside each image of a rank."""
        codes = mask_codes([[Segment(Mode.FULL, self.sizes[i])] for i in self.dealt[rank]])
        return codes.padded(self.padding(rank))


@dataclass(frozen=True)
class Planner:
    """Makes the plans of one rank: called with a batch, it returns the batch with its plans."""

    plan: Callable[[AttentionCodes, int], Any]
    cp_rank: int
    cp_size: int
    head: int
    vit_head: int
    has_vit: bool
    """Whether this rank runs the tower."""

    @staticmethod
    def of(config: Config, mesh: Mesh, engine: AttentionEngine) -> "Planner":
        """The planner of this rank."""
        has_vit = mesh.pp.first and config.model.visual_und
        cp, head = mesh.cp, config.model.kv_channels
        return Planner(engine.plan, cp.rank, cp.size, head, vit_head(config), has_vit)

    def __call__(self, batch: PackedBatch) -> PackedBatch:
        """The batch with its plans; as it is if it has them."""
        return batch if batch.plans else replace(batch, plans=self.plans(batch))

    def plans(self, batch: PackedBatch) -> AttentionPlans:
        """Plans for this rank's queries."""
        layers = self.plan(batch.layout.codes(batch.pack, self.cp_rank), self.head)
        if not self.has_vit:
            return AttentionPlans(layers, None)
        vit = VitShares.of(batch.pack, self.cp_size).codes(self.cp_rank)
        return AttentionPlans(layers, self.plan(vit, self.vit_head))
