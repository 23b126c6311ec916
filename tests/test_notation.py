"""Shape suffixes: every letter has one meaning and every shape is listed, in docs/notation.md."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = re.compile(r"_([A-Z0-9ughw]*[A-Z][A-Z0-9ughw]*|[ughw]|hw3|3hw)$")
"""What follows the last underscore where it is written like a shape: `gD` of `gen_gD`."""

ALLOWED: dict[Path, str] = {}
"""Shapes that are yet to be renamed, by file: none."""


def tables() -> tuple[set[str], set[str]]:
    """Letters and shapes that docs/notation.md lists."""
    text = (ROOT / "docs" / "notation.md").read_text()
    letters, shapes = text.partition("## Letters")[2].split("## Shapes")
    cells = [line.split(" | ")[0] for line in shapes.splitlines() if line.startswith("| `")]
    return set(re.findall(r"^\| `(\w)` \|", letters, re.M)), set(re.findall(r"`(\w+)`", " ".join(cells)))


def names(source: str) -> Iterator[str]:
    """Names of variables, arguments and attributes, constants left out."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                if not name.isupper() and not re.match("_*[A-Z]", name):
                    yield name


def suffixed(source: str) -> dict[str, str]:
    """Shape suffix by name, of the names that have one."""
    return {name: found.group(1) for name in names(source) if (found := SUFFIX.search(name))}


def unknown(source: str, allowed: str = "") -> list[str]:
    """Names in `source` whose shape is not listed."""
    _, shapes = tables()
    known = shapes | set(allowed.split())
    return sorted(name for name, shape in suffixed(source).items() if shape not in known)


def test_every_letter_is_defined_once_and_used() -> None:
    letters, shapes = tables()
    text = (ROOT / "docs" / "notation.md").read_text()
    assert len(re.findall(r"^\| `\w` \|", text, re.M)) == len(letters)
    assert set(re.sub(r"\d", "", "".join(shapes))) == letters


@pytest.mark.parametrize("folder", ["megabagel", "kernels"])
def test_every_shape_is_listed(folder: str) -> None:
    wrong = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in unknown(path.read_text(), ALLOWED.get(path, ""))]
    assert not wrong, "shapes that docs/notation.md does not list:\n" + "\n".join(wrong)


def test_no_allowance_outlives_its_need() -> None:
    for path, shapes in ALLOWED.items():
        found = set(suffixed(path.read_text()).values()) if path.is_file() else set()
        assert set(shapes.split()) <= found, f"{path}: remove {set(shapes.split()) - found} from ALLOWED"


def test_shapes_are_found() -> None:
    source = "def f(x_TQQ, y): return x_TQQ.gen_uI + y(time_AA=1) + FEW_ROWS + Some_T + size_f64 + x_TNH + row_u"
    assert unknown(source) == ["gen_uI", "time_AA", "x_TQQ"]
    assert unknown(source, "TQQ AA") == ["gen_uI"]
    assert suffixed("a_hw3, b_3hw, c_w, d_new, e_T1W") == {"a_hw3": "hw3", "b_3hw": "3hw", "c_w": "w", "e_T1W": "T1W"}
