"""YAML reader and writer with the scalars of YAML 1.2, unique keys, and limits on size and nesting.

PyYAML parses YAML 1.1, in which 010 is 8, 1:30 is 90, `on` is true and 2026-01-01 a date, values that hardly anyone
means. Limits are needed because aliases can stand for billions of values in a few lines.
"""

import re
from typing import Any

import yaml

MOST_BYTES = 2**20
"""Size limit of a config file; the longest recipe has some kB."""
MOST_VALUES = 100_000
"""Most keys and values of a file, counting aliases as often as they are used."""
DEEPEST = 64
"""Most levels of nesting; the config tree has four."""
LARGEST = 2**63 - 1


class YamlError(ValueError):
    """A text that is not valid or too large; the message is one line, with line and column where known."""


def load_yaml(text: str) -> Any:
    """Parse a YAML text.

    Raises:
        YamlError: the text is not valid YAML, or exceeds the limits.
    """
    try:
        return _load(text)
    except RecursionError as error:
        raise YamlError(f"nested too deeply; expected at most {DEEPEST} levels") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(f"{where}{error.problem}") from error
    # ValueError and OverflowError come from an escape such as \U that names no character.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise YamlError(" ".join(str(error).split())) from error


def load_word(text: str) -> Any:
    """Parse the value of a command-line override: as `load_yaml`, but ` #` in a plain scalar begins no comment."""
    # The shell has already removed comments, so a # that is left belongs to the value.
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
    """Raise MarkedYAMLError if a document has more than MOST_VALUES values, before any of them is constructed."""
    # Memoized by node: an alias refers to the same node, whose size is added again without walking it again.
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
    """SafeLoader with the scalars of YAML 1.2 that refuses duplicate keys, of which PyYAML silently keeps the last."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (filled below)

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, or raise MarkedYAMLError if it is nested too deeply."""
        # Checked while parsing, not afterwards: PyYAML's scanner takes quadratic time for thousands of levels.
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
        """Construct the value of a node."""
        # A tag that does not fit its text (`!!bool maybe`) raises assorted errors in PyYAML; this adds line and column.
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, KeyError, TypeError, AttributeError, IndexError) as error:
            problem = f"{str(node.value)!a:.80} is no value ({str(error)[:80]}); put quotes around it if it is a text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from error

    def construct_yaml_int(self, node: Any) -> int:
        """Construct an integer written in decimal, 0x or 0o; leading zeros have no meaning, unlike in YAML 1.1."""
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
        """Construct a float: a number with a point or an exponent, .inf or .nan."""
        text = self.construct_scalar(node)
        if len(text) > 400:
            raise ValueError("a number of more than 400 characters")
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes texts which YAML 1.1 or 1.2 would read as another type."""


def dump_yaml(value: Any, **options: Any) -> str:
    """Return a value as YAML text that `load_yaml` reads back; `options` are those of `yaml.dump`."""
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
