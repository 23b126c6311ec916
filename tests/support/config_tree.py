"""A small valid config, and changes to it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megabagel.config.schema import Config, DataConfig, ResizeConfig, SampleRequest, SourceConfig, TelemetryConfig

VALID = Config(
    data=DataConfig(
        sources=(
            SourceConfig("pairs", "pairs-*.tar", "t2i", 2.0),
            SourceConfig("captions", "pairs-*.tar", "i2t"),
            SourceConfig("notes", "notes-*.tar", "text", 0.0),
        ),
        val_sources=(SourceConfig("held", "held-*.tar", "t2i"), SourceConfig("held notes", "held-*.tar", "text")),
        vae_resize=ResizeConfig(max_size=128, min_size=64),
        vit_resize=ResizeConfig(max_size=112, min_size=56),
    ),
    telemetry=TelemetryConfig(
        sample_every=10,
        prompts=("a red circle",),
        edits=(SampleRequest("page.png", "make it blue"),),
        questions=(SampleRequest("page.png", "what is it?"),),
        sample_size=(64, 96),
    ),
)
"""Breaks no rule, and gives every rule something to judge."""


def change(node: Any, values: Mapping[str, Any]) -> Any:
    """Return `node` with the value at each dotted key replaced."""
    for key, value in values.items():
        node = _change(node, key.split("."), value)
    return node


def _change(node: Any, parts: list[str], value: Any) -> Any:
    if not parts:
        return value
    name, *rest = parts
    if isinstance(node, tuple):
        i = int(name)
        return (*node[:i], _change(node[i], rest, value), *node[i + 1 :])
    return replace(node, **{name: _change(getattr(node, name), rest, value)})
