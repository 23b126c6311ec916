"""Recipes: what to read, which steps with which options, and how to write, as YAML.

name: manuals                     part of the names of shards
read: {kind: web}                 a reader and its options
steps:                            in order; a name, or a name with options
  - damaged_files
  - image_sides: {least: 150}
write: {layout: interleaved, samples_per_shard: 1000}
models: {chat: {kind: endpoint, url: http://127.0.0.1:8000/v1, model: NAME}}      only for steps that ask one
modules: [my_steps]               Python modules with steps of your own
seed: 0
batch: 1                          documents that pass the steps together: more where a step asks a model
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_own
from megabagel.config.yaml_text import MOST_BYTES, YamlError, load_yaml
from megabagel.curation.partitions import digest_of
from megabagel.curation.read.reader import READERS, reader_of
from megabagel.curation.samples import LAYOUTS
from megabagel.curation.steps import REGISTRY, Step
from megabagel.errors import UserError

MODULES = ("web", "repeats", "topics", "rewrite", "pairs", "reasoning", "video")
"""Modules of this room with steps."""
WRITE = {"layout": "interleaved", "samples_per_shard": 1000}
MODELS: Mapping[str, Any] = {
    "kind": "endpoint",
    "url": "",
    "model": "",
    "checkpoint": "",
    "concurrency": 8,
    "timeout": 120.0,
    "rate": 0.0,
    "prices": [0.0, 0.0],
}
"""Options of `models.chat` with their defaults."""
OF_THE_PLACE = ("url", "concurrency", "timeout", "rate", "prices")
"""Options of a model that change no output, and so are no part of a recipe's identity."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe, with all defaults filled in."""

    name: str
    read: Mapping[str, Any]
    """Options of the reader; `kind` names it."""
    steps: tuple[tuple[str, Mapping[str, Any]], ...]
    write: Mapping[str, Any]
    models: Mapping[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    seed: int = 0
    batch: int = 1

    def identity(self) -> dict[str, Any]:
        """Everything that the output depends on, as JSON."""
        models = {
            name: {k: v for k, v in about.items() if k not in OF_THE_PLACE} for name, about in self.models.items()
        }
        return {
            "name": self.name,
            "read": dict(self.read),
            "steps": [[name, dict(options)] for name, options in self.steps],
            "write": dict(self.write),
            "models": models,
            "modules": list(self.modules),
            "seed": self.seed,
        }

    @property
    def digest(self) -> str:
        """Digest of `identity`."""
        return digest_of(self.identity())


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    Raises:
        UserError: the file cannot be read, or names something unknown.
    """
    data = read_own(path, MOST_BYTES, "Expected a recipe such as examples/curation/web_small.yaml.")
    try:
        value = load_yaml(data.decode())
    except (YamlError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    try:
        return checked(value, default_name=path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def checked(value: Any, default_name: str = "recipe") -> Recipe:
    """A recipe from the value of its YAML.

    Raises:
        UserError: a key, step or option is unknown, or a value has the wrong type.
    """
    known: dict[str, Any] = {
        "name": default_name, "read": {}, "steps": [], "write": {}, "models": {}, "modules": [], "seed": 0, "batch": 1,
    }  # fmt: skip
    top = filled("", value, known)
    for module in top["modules"]:
        _import(module)
    steps = tuple(_step(f"steps[{number}]", entry) for number, entry in enumerate(top["steps"]))
    read, write = dict(top["read"]), filled("write", top["write"], WRITE)
    kind = _one_of("read.kind", read.pop("kind", None), READERS)
    options = filled("read", read, reader_of(kind).options)
    _one_of("write.layout", write["layout"], LAYOUTS)
    models = {name: filled(f"models.{name}", about, MODELS) for name, about in top["models"].items()}
    for name, about in models.items():
        _one_of("models", name, {"chat": None})
        _one_of(f"models.{name}.kind", about["kind"], {"endpoint": None, "checkpoint": None})
    if min(top["batch"], write["samples_per_shard"]) < 1:
        raise UserError("batch and write.samples_per_shard: expected at least 1")
    if not all(character.isalnum() or character in "-_" for character in top["name"]) or not top["name"]:
        raise UserError(f"name: {top['name']!r}; expected letters, digits, - and _: it becomes part of file names")
    for name, given in steps:
        if given.get("by") == "model" and "chat" not in models:
            raise UserError(f"steps: {name} asks a model (by: model), but the recipe has no models.chat")
    read = {"kind": kind, **options}
    return Recipe(top["name"], read, steps, write, models, tuple(top["modules"]), top["seed"], top["batch"])


def _import(module: str) -> None:
    try:
        import_module(module)
    except ImportError as error:
        raise UserError(f"modules: {module!r} cannot be imported ({error}); it must lie on PYTHONPATH") from error


def all_steps() -> Mapping[str, Step]:
    """All steps of this room and of the modules that were imported."""
    for module in MODULES:
        import_module(f"megabagel.curation.{module}")
    return REGISTRY


def _step(where: str, entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: {entry!r:.80}; expected the name of a step, or one name with its options")
    ((name, given),) = entry.items()
    steps = all_steps()
    _one_of(where, name, steps)
    defaults = {option: parameter.default for option, parameter in steps[name].options.items()}
    return name, filled(f"{where} {name}", given or {}, defaults)


def filled(where: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Given options over their defaults; every value has the type of its default.

    Raises:
        UserError: an option is unknown or of another type.
    """
    if not isinstance(given, dict):
        raise UserError(f"{where or 'recipe'}: {given!r:.80}; expected keys with values")
    result = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    for name, value in given.items():
        place = f"{where}.{name}" if where else str(name)
        _one_of(place, name, defaults)
        result[name] = _typed(place, value, result[name])
    return result


def _typed(place: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        names = {str: "a text", int: "an integer", float: "a number", bool: "true or false", list: "a list"}
        raise UserError(f"{place}: {value!r:.80}; expected {names.get(kind, 'keys with values')}")
    return value


def _one_of(place: str, name: Any, known: Mapping[str, Any]) -> str:
    if isinstance(name, str) and name in known:
        return name
    near = difflib.get_close_matches(str(name), list(known), 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{place}: {name!r:.80} is unknown{hint} Expected one of {', '.join(sorted(known))}")
