"""Loading of a `Config` from a YAML file and `section.key=value` overrides, and writing it as YAML.

All problems of the file, the overrides and the rules between fields are reported together in one message.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from megabagel.config.checks import violations
from megabagel.config.reading import read_file
from megabagel.config.schema import Config
from megabagel.config.typed import Problems, add_unknown, build, known_keys, pattern, show
from megabagel.config.yaml_text import MOST_BYTES, YamlError, dump_yaml, load_word, load_yaml
from megabagel.errors import UserError

_COMMAND_LINE = "command line"

_MOST_LINES = 50
"""Most problems that one message lists."""
_DEEPEST_BASE = 32
"""Longest chain of files that name each other as `base`."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply overrides and check the result.

    Args:
        path: YAML file. It may name another one as `base: other.yaml` (relative to itself): mappings are merged key by
            key, everything else, lists included, is replaced by the later file.
        overrides: `section.key=value`, applied in order, with the value in YAML; keys may contain list indices
            (`data.sources.0.weight=2`).

    Raises:
        UserError: one message with a line per problem: key, value, expectation and origin.
    """
    tree = to_dict(Config())
    # Which file, or the command line, set each dotted key: messages name it.
    origins: dict[str, str] = {}
    for name, layer in _read_layers(Path(path)):
        _merge(tree, layer, name, origins)
    return _resolve(tree, origins, overrides, str(path))


def override(config: Config, overrides: Sequence[str], name: str) -> Config:
    """Apply overrides to a config that was not read from a file, and check the result as `load` does.

    Args:
        config: the config to start from.
        overrides: `section.key=value`, as of `load`.
        name: origin of `config` in messages.
    """
    return _resolve(to_dict(config), {"": name}, overrides, name)


def _resolve(tree: dict[str, Any], origins: dict[str, str], overrides: Sequence[str], name: str) -> Config:
    problems = Problems()
    for text in overrides:
        _apply(tree, text, problems, origins)
    config = build(Config, tree, problems)
    lines = [f"{text} ({_origin(key, origins)})" for key, text in problems.found]
    lines += violations(config, problems.doubtful)
    if lines:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        lines[_MOST_LINES:] = [f"... and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        raise UserError("\n  ".join((f"{name}: {count} in the configuration", *lines)))
    return config


def to_dict(config: Any) -> Any:
    """Return a config, or a part of one, as plain dicts, lists and scalars."""
    if is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, tuple):
        return [to_dict(item) for item in config]
    return config


def dump(config: Config, path: str | Path) -> None:
    """Write the complete config as YAML; `load(path)` returns an equal one."""
    try:
        write_yaml(to_dict(config), path)
    except OSError as error:
        raise UserError(f"{path}: cannot write the config: {error.strerror}; choose another run.dir") from error


def write_yaml(tree: dict[str, Any], path: str | Path) -> None:
    """Write plain dicts, lists and scalars (a whole config or some sections of it) as YAML."""
    Path(path).write_text(dump_yaml(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Return (file name, content) of `path` and of the files in its chain of `base`, the last base first."""
    if "\0" in str(path):
        raise UserError(f"{above[-1] if above else path}: base = {show(str(path))}: expected the name of a file")
    chain = (*above, path.resolve())
    if len(chain) > _DEEPEST_BASE:
        raise UserError(f"{path}: 'base' of {_DEEPEST_BASE} files in a row; expected fewer")
    if path.resolve() in above:
        raise UserError(f"{path}: 'base' runs in a circle: {' -> '.join(map(str, chain))}; remove one of these")
    content = _read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return [(str(path), content)]
    if not isinstance(base, str):
        raise UserError(f"{path}: base = {show(base)}: expected the name of one YAML file")
    return [*_read_layers(path.parent / base, chain), (str(path), content)]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = load_yaml(read_file(path, MOST_BYTES).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config: {error.strerror}; expected a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; expected a YAML file") from error
    except YamlError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {show(content)}; expected a mapping with sections {', '.join(to_dict(Config()))}"
        )
    return content


def _merge(tree: dict[str, Any], layer: dict[str, Any], name: str, origins: dict[str, str], path: str = "") -> None:
    """Merge `layer`, the content of file `name`, into `tree` and record in `origins` where each key was set.

    Args:
        tree: plain config, changed in place.
        layer: keys to set.
        name: file, or the command line.
        origins: origin by dotted key, changed in place.
        path: dotted key of `tree`, with a dot at its end.
    """
    for key, value in layer.items():
        full = f"{path}{key}"
        if isinstance(tree.get(key), dict) and isinstance(value, dict):
            _merge(tree[key], value, name, origins, f"{full}.")
        # YAML reads a section header without keys below it as null; it leaves the section unchanged.
        elif not (isinstance(tree.get(key), dict) and value is None):
            tree[key] = value
            origins[full] = name


def _apply(tree: dict[str, Any], override: str, problems: Problems, origins: dict[str, str]) -> None:
    """Set one `section.key=value` in `tree`, or add a problem."""
    key, equals, text = override.partition("=")
    origins[key] = _COMMAND_LINE
    if not equals:
        problems.add(key, f"{override!r}: expected section.key=value")
        return
    try:
        value = load_word(text)
    except YamlError as error:
        problems.add(key, f"{key} = {show(text)}: {error}")
        return
    if pattern(key) not in set(known_keys()):
        add_unknown(key, value, problems)
        return
    try:
        _set(tree, key.split("."), value, origins)
    except _NoPlace as error:
        problems.add(key, f"{key} = {show(value)}: {error}")


class _NoPlace(Exception):
    """An override names a list entry or a section that the tree does not have."""


def _set(tree: dict[str, Any], parts: list[str], value: Any, origins: dict[str, str]) -> None:
    """Merge `value` into `tree` at the dotted key `parts`."""
    node: Any = tree
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        if isinstance(node, list) and part.isdecimal():
            if int(part) >= len(node):
                raise _NoPlace(f"{above} has {len(node)} entries, numbered from 0")
            place: Any = int(part)
        elif isinstance(node, dict):
            place = part
        else:
            raise _NoPlace(f"{above} is {show(node)}; set {above} as a whole")
        parent, node = node, node[place] if isinstance(node, list) else node.get(place)
    if isinstance(parent, dict):
        _merge(parent, {parts[-1]: value}, _COMMAND_LINE, origins, "".join(f"{part}." for part in parts[:-1]))
    else:
        parent[place] = value
        # Origins are recorded per list, not per entry: the checks treat a list as one value.
        origins[".".join(parts[:-1])] = _COMMAND_LINE


def _origin(key: str, origins: dict[str, str]) -> str:
    """Return the origin of the value at `key`: that of the longest prefix of the key that was set."""
    while key not in origins:
        key = key.rpartition(".")[0]
    return origins[key]
