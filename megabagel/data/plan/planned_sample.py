"""Visits: a sample's turn in a run, as sizes for the plan of the whole job and laid out for the rank that runs it.

Both are pure functions of the config, the key and the document, so a worker process needs nothing else.
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
    """One visit of one sample, as the plan knows it (a tuple: a step may have 160,000 to hand over)."""

    key: SampleKey
    size: Size


@dataclass(frozen=True, slots=True)
class PackPlan:
    """Which visits form a pack, in order, and what it amounts to."""

    visits: tuple[Visit, ...]
    size: Size

    @classmethod
    def of(cls, visits: tuple[Visit, ...]) -> "PackPlan":
        """The pack of these visits."""
        return cls(visits, total(visit.size for visit in visits))


@dataclass(frozen=True, slots=True)
class Task:
    """A pack to fill: number `pack` of step `step`, and the documents behind its visits."""

    step: int
    pack: int
    plan: PackPlan
    documents: tuple[Document, ...]


@dataclass(frozen=True)
class Rules:
    """How documents become samples in one run. `tasks`: by source."""

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
        """A visit with its size."""
        items = self._items(key, document)
        return Visit(key, sample_size(items, dropped_items(items, key, self.dropout)))

    def pack(self, plan: PackPlan, documents: Sequence[Document]) -> Pack:
        """A pack laid out; `documents`: of its visits."""
        return build_pack([
            self._lay_out(visit.key, document) for visit, document in zip(plan.visits, documents, strict=True)
        ])  # fmt: skip

    def _lay_out(self, key: SampleKey, document: Document) -> SamplePlan:
        items = self._items(key, document)
        return lay_out(items, key, dropped_items(items, key, self.dropout), self.advance_dropped)

    def _items(self, key: SampleKey, document: Document) -> list[Item]:
        return self.expander.items(document, self.tasks[key.source], key)
