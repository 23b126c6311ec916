"""Planned samples: token counts for the global plan, and the full layout for the rank that trains on them.

Both are pure functions of the config, the key and the document, so a worker process can lay out a pack without the
global plan.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megabagel.config.schema import Config
from megabagel.data.documents import Document
from megabagel.data.plan.expand import Expander
from megabagel.sequence.items import Item
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.sample import Dropout, SamplePlan, dropped_items, lay_out
from megabagel.sequence.sizes import Size, sample_size, total


class Visit(NamedTuple):
    """One scheduled use of a sample in one epoch: its identity and its token counts, no content.

    A tuple rather than a dataclass: a step may have 160,000 of them, which the planner process passes on.
    """

    key: SampleKey
    size: Size


@dataclass(frozen=True, slots=True)
class PackPlan:
    """A pack as planned: its visits in sequence order, and their total size."""

    visits: tuple[Visit, ...]
    size: Size

    @classmethod
    def of(cls, visits: tuple[Visit, ...]) -> "PackPlan":
        """The pack of these visits, with their sizes added up."""
        return cls(visits, total(visit.size for visit in visits))


@dataclass(frozen=True, slots=True)
class Task:
    """Work order for a loader worker: pack number `pack` of step `step`, with the documents of its visits.

    The documents travel with the task, so that workers need no copy of the index.
    """

    step: int
    pack: int
    plan: PackPlan
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Rules:
    """Rules by which documents become samples in one run: expansion, task per source, conditioning dropout.

    `advance_dropped`: whether the RoPE counter advances over dropped images (`data.dropped_images_advance`).
    """

    expander: Expander
    tasks: Mapping[str, str]
    dropout: Dropout
    advance_dropped: bool

    @classmethod
    def of(cls, config: Config) -> "Rules":
        """The rules of a config."""
        data = config.data
        tasks = {source.name: source.task for source in data.sources}
        dropout = Dropout(data.drop_text, data.drop_vit, data.drop_latent)
        return cls(Expander.of(config), tasks, dropout, data.dropped_images_advance)

    def visit(self, key: SampleKey, document: Document) -> Visit:
        """A visit of a document, with its size after conditioning dropout."""
        items = self._items(key, document)
        return Visit(key, sample_size(items, dropped_items(items, key, self.dropout)))

    def pack(self, plan: PackPlan, documents: Sequence[Document]) -> Pack:
        """Lay out a pack: positions, mask integers and loss masks of all its tokens.

        Args:
            plan: the pack.
            documents: one per visit, in the order of the visits.
        """
        return build_pack([
            self._lay_out(visit.key, document) for visit, document in zip(plan.visits, documents, strict=True)
        ])  # fmt: skip

    def _lay_out(self, key: SampleKey, document: Document) -> SamplePlan:
        items = self._items(key, document)
        return lay_out(items, key, dropped_items(items, key, self.dropout), self.advance_dropped)

    def _items(self, key: SampleKey, document: Document) -> list[Item]:
        return self.expander.items(document, self.tasks[key.source], key)
