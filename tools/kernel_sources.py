"""Digests of the kernels' source code without comments and docstrings: has a kernel changed since the gate compiled it?

The gate (`kernel_gate.py`) takes minutes, so CI compiles a few kernels and compares these digests for the others.
"""

import ast
import hashlib
import json
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kernels" / "megabagel_kernels"
RECORD = PACKAGE.parents[1] / "benchmarks" / "results" / "kernel_gate_sources.json"


def digests() -> dict[str, str]:
    """Return the digest of every file that Triton functions or their launches are read from, by path in the package."""
    files = (path for path in sorted(PACKAGE.rglob("*.py")) if "triton" in path.name or _uses_triton(path))
    return {path.relative_to(PACKAGE).as_posix(): _digest(path) for path in files}


def changed() -> list[str]:
    """Return the files that differ from the record, are new, or are gone."""
    stored, found = json.loads(RECORD.read_text()), digests()
    return sorted(name for name in stored.keys() | found.keys() if stored.get(name) != found.get(name))


def record() -> None:
    """Write the digests of the sources as they are now."""
    RECORD.write_text(json.dumps(digests(), indent=1) + "\n")


def _uses_triton(path: Path) -> bool:
    return "@triton.jit" in path.read_text() or path.name == "configs.py"


def _digest(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # A docstring is a statement that is a lone string; strings after constants document them.
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16]


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)
