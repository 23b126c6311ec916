"""Which room of the house may import which, and how long a file and a function may be.

`python tests/test_import_directions.py` prints the table for docs/architecture.md and the longest file and function.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = (ROOT / "megabagel", ROOT / "kernels")
MARKERS = ("<!-- import-map -->\n", "<!-- /import-map -->")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


class Room(NamedTuple):
    """What the files of a room may import, at the top or lazily, beside the standard library and the room itself."""

    rooms: tuple[str, ...]
    libraries: tuple[str, ...]
    """Top-level packages; `torch.distributed` counts as a library of its own."""


TENSORS = ("numpy", "torch")
RANKS = (*TENSORS, "torch.distributed", "megatron")

BASE = ("errors", "log", "locks")
"""Small files of their own beside the rooms."""
MODEL = (*BASE, "config", "sequence", "kernels", "runtime", "model", "parallel")
"""All that computes, on one device or many."""

ROOMS = {
    "errors": Room((), ()),
    "log": Room(("errors",), ()),
    "locks": Room(("errors",), ()),
    "journal": Room(("errors",), ()),
    "chat_client": Room(("errors",), ()),
    "kernels": Room((), (*TENSORS, "triton")),
    "config": Room(("errors",), ("yaml",)),
    "sequence": Room(("errors", "config", "kernels"), TENSORS),
    "rewards": Room(("errors", "config"), ("numpy",)),
    "runtime": Room((*BASE, "config"), ("torch", "torch.distributed", "megatron")),
    "data": Room(
        (*BASE, "config", "sequence", "rewards"),
        (*TENSORS, "PIL", "tokenizers", "sentencepiece", "pyarrow", "nvidia", "safetensors"),
    ),
    "model": Room(("errors", "config", "sequence", "kernels"), (*TENSORS, "safetensors")),
    "parallel": Room((*BASE, "config", "sequence", "kernels", "runtime", "model"), RANKS),
    "checkpoint": Room((*BASE, "config", "sequence", "runtime", "model", "parallel"), (*RANKS, "safetensors")),
    "sampling": Room(("errors",), TENSORS),
    "inference": Room((*MODEL, "data", "sampling", "checkpoint"), (*RANKS, "PIL", "safetensors", "yaml")),
    "serve": Room(
        ("errors", "sequence", "runtime", "data", "sampling", "inference"), ("numpy", "PIL", "starlette", "uvicorn")
    ),
    "train": Room((*MODEL, "data", "checkpoint"), (*RANKS, "PIL", "rich", "tensorboard")),
    "planner": Room((*MODEL, "data", "checkpoint", "train"), (*RANKS, "yaml")),
    "evaluation": Room((*MODEL, "journal", "chat_client", "data", "checkpoint", "inference", "train"), (*RANKS, "PIL")),
    "posttrain": Room(
        (*MODEL, "journal", "rewards", "data", "sampling", "checkpoint", "inference", "train", "evaluation"),
        (*RANKS, "PIL", "segment_anything"),
    ),
    "parity": Room(
        (*MODEL, "rewards", "data", "checkpoint", "sampling", "inference", "train", "posttrain"),
        (*RANKS, "PIL", "safetensors"),
    ),
    "bench": Room((*MODEL, "rewards", "data", "checkpoint", "train"), (*RANKS, "psutil", "yaml")),
    "sweep": Room((*BASE, "journal", "config", "train", "evaluation"), ()),
    "curation": Room(
        ("errors", "log", "locks", "journal", "chat_client", "config", "sequence", "data", "inference"),
        ("numpy", "PIL", "av", "ray"),
    ),
    "doctor": Room(("errors", "kernels", "runtime", "parallel"), (*RANKS, "packaging", "psutil", "rich")),
}
ENTRANCES = ("", "api", "cli", "commands", "__main__")
"""Modules that may import every room; no room imports them."""

LIGHT = {"torch": ("cli", "commands", "config", "curation"), "megatron": ("sequence", "data", "model")}
"""Packages that take seconds to import, and rooms that must load without them, whatever those reach."""

Import = tuple[str, int]
"""Dotted name of what is imported, and the line."""


def python_files() -> list[Path]:
    return sorted(file for tree in TREES for file in tree.rglob("*.py"))


def module_name(file: Path) -> str:
    """megabagel/config/load.py -> megabagel.config.load."""
    tree = ROOT / "kernels" if file.is_relative_to(ROOT / "kernels") else ROOT
    parts = file.relative_to(tree).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(name: str) -> str:
    """megabagel.config.load -> config; "" is the package's own __init__."""
    package, _, rest = name.partition(".")
    return "kernels" if package == "megabagel_kernels" else rest.split(".")[0]


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[Import]:
    """Every import of a module, and every use of `torch.distributed` as an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if is_package else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            yield "torch.distributed", node.lineno


def breach(importer: str, imported: str) -> str | None:
    """What a room must not import, or None."""
    library = imported.split(".")[0]
    if library in sys.stdlib_module_names:
        return None
    if library in ("megabagel", "megabagel_kernels"):
        room = room_of(imported)
        allowed = room == importer or room in ROOMS[importer].rooms
        return None if allowed else f"room {room!r}"
    if imported.startswith("torch.distributed"):
        library = "torch.distributed"
    elif imported.startswith("torch.utils.tensorboard"):
        library = "tensorboard"
    return None if library in ROOMS[importer].libraries else f"library {library!r}"


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of one file that its room may not have."""
    room = room_of(module)
    if room in ("", *ENTRANCES):
        return []
    found = imports(ast.parse(source), module, is_package)
    return [f"{module}:{line}: {room} must not import {what}" for name, line in found if (what := breach(room, name))]


def functions() -> Iterator[tuple[int, str]]:
    """(lines, place) of every function."""
    for file in python_files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.end_lineno - node.lineno + 1, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"


def files() -> Iterator[tuple[int, str]]:
    """(lines, path) of every file."""
    for file in python_files():
        yield len(file.read_text().splitlines()), str(file.relative_to(ROOT))


def map_table() -> str:
    """The map as docs/architecture.md shows it."""
    lines = ["| room | may import rooms | may import libraries |", "| --- | --- | --- |"]
    for name, room in ROOMS.items():
        rooms, libraries = (", ".join(f"`{x}`" for x in names) or "none" for names in room)
        lines.append(f"| `{name}` | {rooms} | {libraries} |")
    entrances = ", ".join(f"`{name or 'megabagel'}`" for name in ENTRANCES)
    return "\n".join([*lines, f"| {entrances} | all | all |"]) + "\n"


def test_every_room_is_on_the_map() -> None:
    rooms = {room_of(module_name(file)) for file in python_files()} - {""}
    assert rooms <= {*ROOMS, *ENTRANCES}


def test_rooms_import_only_what_they_may() -> None:
    found = [
        line
        for file in python_files()
        for line in breaches(file.read_text(), module_name(file), file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "says"),
    [
        ("megabagel.config.load", "import torch", "config must not import library 'torch'"),
        ("megabagel.sequence.pack", "def f():\n    from megatron.core import x", "library 'megatron'"),
        ("megabagel.model.layers", "import torch\ntorch.distributed.get_rank()", "library 'torch.distributed'"),
        ("megabagel.model.layers", "from torch import distributed", "library 'torch.distributed'"),
        ("megabagel.model.layers", "from ..parallel import mesh", "room 'parallel'"),
        ("megabagel.model.layers", "from megabagel import parallel", "room 'parallel'"),
        ("megabagel.train.loop", "from megabagel.cli import main", "room 'cli'"),
        ("megabagel.train.loop", "try:\n    import apex\nexcept ImportError:\n    pass", "library 'apex'"),
        ("megabagel_kernels.flow", "from megabagel.errors import UserError", "room 'errors'"),
    ],
)
def test_a_breach_is_found(module: str, source: str, says: str) -> None:
    (found,) = breaches(source, module)
    assert found.endswith(says)


@pytest.mark.parametrize(
    ("module", "is_package", "source"),
    [
        ("megabagel.model.layers", False, "from .vit import Vit\nfrom . import flow\nfrom ..config import schema"),
        ("megabagel.model", True, "from .vit import Vit\nfrom ..config import schema\nimport json"),
        ("megabagel.parallel.mesh", False, "from torch import distributed\nimport megatron.core.parallel_state"),
        ("megabagel.train.sinks", False, "from torch.utils.tensorboard import SummaryWriter"),
    ],
)
def test_an_allowed_import_is_not(module: str, is_package: bool, source: str) -> None:
    assert breaches(source, module, is_package) == []


@pytest.mark.parametrize(("package", "room"), [(package, room) for package, rooms in LIGHT.items() for room in rooms])
def test_room_loads_without(package: str, room: str) -> None:
    names = [name for file in python_files() if room_of(name := module_name(file)) == room]
    code = f"import sys, {', '.join(names)}\nsys.exit({package!r} in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ran.returncode == 0, f"importing {room} loads {package}; {ran.stderr}"


def test_architecture_document_shows_the_map() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    shown = text.partition(MARKERS[0])[2].partition(MARKERS[1])[0]
    assert shown == map_table(), "python tests/test_import_directions.py prints the table"


def test_files_and_functions_stay_short() -> None:
    assert [row for row in files() if row[0] > LONGEST_FILE] == []
    assert [row for row in functions() if row[0] > LONGEST_FUNCTION] == []


if __name__ == "__main__":
    print(map_table())
    print("longest files:    ", *sorted(files(), reverse=True)[:3], sep="\n  ")
    print("longest functions:", *sorted(functions(), reverse=True)[:3], sep="\n  ")
