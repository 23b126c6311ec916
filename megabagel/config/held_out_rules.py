"""Rules about the held-out set: `data.val_sources` and `train.val_every` (see `config.rules`)."""

from collections.abc import Iterator

from megabagel.config.data_rules import GENERATES, LOOKS
from megabagel.config.rules import rule
from megabagel.config.schema import Config


@rule("train.val_every", "data.val_sources")
def held_out_loss_has_a_source(c: Config) -> Iterator[str]:
    """The held-out loss is measured on sources of its own."""
    if c.train.val_every and not c.data.val_sources:
        yield "List data.val_sources, or set train.val_every to 0."


@rule("data.val_sources", "data.val_sources.*.name", "data.val_sources.*.path")
def held_out_sources_have_name_and_path(c: Config) -> Iterator[str]:
    """Every held-out source has a glob of shards and a name of its own."""
    names = [source.name for source in c.data.val_sources]
    for i, source in enumerate(c.data.val_sources):
        if not source.path:
            yield f"data.val_sources.{i}.path = ''; give it one."
        if not source.name:
            yield f"data.val_sources.{i}.name = ''; give it one."
        elif names.index(source.name) != i:
            yield f"data.val_sources.{i}.name = {source.name!r} is that of an earlier one; rename one."


@rule("data.val_sources", "data.val_sources.*.weight")
def some_held_out_source_has_weight(c: Config) -> Iterator[str]:
    """Held-out samples are drawn in proportion to the weights of their sources."""
    if c.data.val_sources and not any(source.weight for source in c.data.val_sources):
        yield "data.val_sources.*.weight = 0 in all of them; give at least one a weight above 0."


@rule("data.val_sources", "data.val_sources.*.task", "model.visual_gen", "model.visual_und")
def held_out_tasks_have_a_branch(c: Config) -> Iterator[str]:
    """Held-out tasks need the branches that training tasks need."""
    for i, source in enumerate(c.data.val_sources):
        for tasks, key, there in (
            (GENERATES, "model.visual_gen", c.model.visual_gen),
            (LOOKS, "model.visual_und", c.model.visual_und),
        ):
            if source.task in tasks and not there:
                yield f"data.val_sources.{i}.task = {source.task!r}: set {key} to true, or drop the source."
