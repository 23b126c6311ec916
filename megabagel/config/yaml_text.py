"""YAML as this program reads it: scalars of YAML 1.2, a key once, and limits on what a text may ask for.

PyYAML is a parser of YAML 1.1, in which 010 is 8, 1:30 is 90, `on` is true and 2026-01-01 a date: values that people
who write them do not mean. Aliases make it possible to write billions of values in a few lines.
"""

import re
from typing import Any

import yaml

MOST_BYTES = 2**20
"""Of a config file; the longest recipe has some kB."""
MOST_VALUES = 100_000
"""Keys and values of a file, those that aliases repeat included."""
DEEPEST = 64
"""Levels of nesting; the config tree has four."""
LARGEST = 2**63 - 1


class YamlError(ValueError):
    """A text that is not read; the message is one line, with line and column where there is one."""


def load_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YamlError: it is no YAML, or asks for more than the limits.
    """
    try:
        return _load(text)
    except RecursionError as error:
        raise YamlError(f"nested too deeply; expected at most {DEEPEST} levels") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an escape that names no character
        raise YamlError(" ".join(str(error).split())) from error


def load_word(text: str) -> Any:
    """The value of a word of the command line: as `load_yaml`, but ` #` begins no comment in a plain word.

    The shell has taken comments away already; what is left belongs to the word.
    """
    value = load_yaml(text)
    if (
        not isinstance(value, dict | list)
        and re.search(r"(^|\s)#", text)
        and text.lstrip()[:1] not in ("'", '"', "|", ">")
    ):
        return text.strip()
    return value


def _load(text: str) -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(root: yaml.Node) -> None:
    """Raise MarkedYAMLError where aliases make more of a text than is sensible, before any value is made."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in open_nodes:
            raise yaml.MarkedYAMLError(
                problem="an alias stands inside of what it repeats", problem_mark=node.start_mark
            )
        open_nodes.add(id(node))
        children = (
            [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        )
        total = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(size(child) for child in children))
        open_nodes.discard(id(node))
        if total > MOST_VALUES:
            problem = f"more than {MOST_VALUES:,} values, those that aliases repeat included"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        sizes[id(node)] = total
        return total

    size(root)


class _Loader(yaml.SafeLoader):
    """YAML in which a key may be given only once (the plain loader silently keeps the last), with scalars of 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (filled below)

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, unless it stands too deep: the scanner takes quadratic time for thousands of levels."""
        self.depth += 1
        if self.depth > DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem=f"nested too deeply; expected at most {DEEPEST} levels", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key.value!a:.80} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node. What a tag cannot make of it (`!!bool maybe`) gets a place in the text."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"{str(node.value)!a:.80} is no value ({str(error)[:80]}); put quotes around it if it is a text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_yaml_int(self, node: Any) -> int:
        """A whole number in digits, 0x or 0o; leading zeros have no meaning."""
        text = self.construct_scalar(node)
        sign, digits = (-1 if text[:1] == "-" else 1), text.lstrip("+-")
        if len(digits) > 64:
            raise ValueError("a number of more than 64 digits")
        base = {"0x": 16, "0o": 8}.get(digits[:2], 10)
        value = sign * int(digits[2:] if base != 10 else digits, base)
        if abs(value) > LARGEST:
            raise ValueError(f"beyond {LARGEST}")
        return value

    def construct_yaml_float(self, node: Any) -> float:
        """A number with a point or an exponent, or .inf or .nan."""
        text = self.construct_scalar(node)
        if len(text) > 400:
            raise ValueError("a number of more than 400 characters")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """Puts quotes around texts that would be read as something else, by YAML 1.1 or 1.2."""


def dump_yaml(value: Any, **options: Any) -> str:
    """A value as text that `load_yaml` reads back; `options` are PyYAML's."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))
