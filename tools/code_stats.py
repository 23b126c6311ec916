"""Counts of how the code reads, for the working tree and for revisions: `python tools/code_stats.py [REVISION ...]`.

Prints one Markdown table, a column per tree. Counted are the Python files of megabagel/ and kernels/; citations also in
tests, docs and configs.
"""

import argparse
import ast
import io
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = ("megabagel/", "kernels/")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
OUTSIDE = re.compile(r"bagel-reference")
"""Citations of a document that the repository does not hold."""
ANY = re.compile(r"\bAny\b")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

Files = dict[str, str]
"""Path -> text."""


def working_tree() -> Files:
    """Return the text files of the working tree that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    files = {}
    for name in listed:
        if (ROOT / name).is_file():
            try:
                files[name] = (ROOT / name).read_text()
            except UnicodeDecodeError:
                continue
    return files


def revision(name: str) -> Files:
    """Return the text files of a git revision."""
    archive = subprocess.run(["git", "archive", name], cwd=ROOT, capture_output=True, check=True).stdout
    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isreg() else None
            if content is not None:
                try:
                    files[member.name] = content.read().decode()
                except UnicodeDecodeError:
                    continue
    return files


def _documented(trees: dict[str, ast.Module]) -> Iterator[str]:
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and (text := ast.get_docstring(node)):
                yield text


def _functions(trees: dict[str, ast.Module]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, FUNCTIONS))


def _lacks_args(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    named = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    count = sum(argument.arg not in ("self", "cls") for argument in named)
    return not function.name.startswith("_") and count >= 4 and "Args:" not in (ast.get_docstring(function) or "")


def count(files: Files) -> dict[str, str]:
    """Return the counts of one tree, by the name of the row."""
    python = {name: text for name, text in files.items() if name.startswith(PRODUCT) and name.endswith(".py")}
    trees = {name: ast.parse(text) for name, text in python.items()}
    lines = [line for text in python.values() for line in text.splitlines()]
    docstrings = list(_documented(trees))
    modules = [(ast.get_docstring(tree) or "") for tree in trees.values()]
    comments = sum(line.lstrip().startswith("#") for line in lines)
    sizes = [node.end_lineno - node.lineno + 1 for node in _functions(trees) if node.end_lineno]
    cited = sum(
        bool(OUTSIDE.search(line))
        for name, text in files.items()
        if name != "tools/code_stats.py"
        for line in text.splitlines()
    )
    return {
        "files": f"{len(python):,}",
        "lines": f"{len(lines):,}",
        'module docstrings beginning with "What"': f"{sum(text.startswith('What') for text in modules)}",
        'all docstrings beginning with "What"': f"{sum(text.startswith('What') for text in docstrings)}",
        "words per docstring": f"{sum(len(text.split()) for text in docstrings) / len(docstrings):.1f}",
        "full-line comments per 1,000 lines": f"{1000 * comments / len(lines):.1f}",
        "lines with `Any`": f"{sum(bool(ANY.search(line)) for line in lines)}",
        "public functions of four or more parameters without Args": f"{sum(map(_lacks_args, _functions(trees)))}",
        "lines that cite a document outside the repository": f"{cited}",
        f"files over {LONGEST_FILE} lines": f"{sum(len(text.splitlines()) > LONGEST_FILE for text in python.values())}",
        f"functions over {LONGEST_FUNCTION} lines": f"{sum(size > LONGEST_FUNCTION for size in sizes)}",
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", metavar="REVISION", nargs="*", help="git revisions to count beside the tree")
    names = [*parser.parse_args().revisions, "working tree"]
    columns = [count(working_tree() if name == "working tree" else revision(name)) for name in names]
    print(f"| | {' | '.join(names)} |\n|{' --- |' * (len(names) + 1)}")
    for row in columns[0]:
        print(f"| {row} | {' | '.join(column[row] for column in columns)} |")


if __name__ == "__main__":
    main()
