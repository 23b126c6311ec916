"""Citations: every cited anchor exists, and no file cites a document that a reader of this repository cannot open."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("megabagel", "kernels", "tests", "tools", "benchmarks", "examples", "docs")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".sh"}

ANCHORED = re.compile(r"([\w./-]+\.md)((?:#[\w-]+)(?:(?:,| and)\s+#[\w-]+)*)")
"""`docs/bagel.md#rope`, and shorter `docs/bagel.md#rope, #mask`."""
OWN_ANCHOR = re.compile(r"\]\((#[\w-]+)\)")
PLACE = re.compile(r"\b(?:sections?|ideas?|chapters?)\s+\d|§")
"""A place inside some document."""
PUBLIC = re.compile(
    r"BAGEL|SRUM|FlashAttention|\b[Pp]aper\b|Llama 3|PaLM|Korthikanti|Narayanan|Rajbhandari|MPICH|architecture\.md#"
)
"""Documents whose places may be cited: published ones, and files of this repository."""
REACH = 160
"""Characters before a place in which its document is named."""


def texts() -> Iterator[tuple[Path, str]]:
    """Every file that a person wrote, but for the golden cases and this test."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and path != Path(__file__).resolve():
                yield path, path.read_text()
    for path in sorted(ROOT.glob("*.md")):
        yield path, path.read_text()


@cache
def anchors(document: Path) -> frozenset[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S), re.M)
    return frozenset("#" + re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def dangling(path: Path, text: str) -> Iterator[str]:
    """Citations in `text`, the content of `path`, of documents or anchors that do not exist."""
    for document, listed in ANCHORED.findall(text):
        found = next((base / document for base in (ROOT, path.parent) if (base / document).is_file()), None)
        known = anchors(found) if found else frozenset()
        yield from (f"{document}{anchor}" for anchor in re.findall(r"#[\w-]+", listed) if anchor not in known)
    if path.suffix == ".md":
        yield from (anchor for anchor in OWN_ANCHOR.findall(text) if anchor not in anchors(path))
    yield from (name for name in re.findall(r"\bdocs/[\w./-]+\.md\b", text) if not (ROOT / name).is_file())


def outside(text: str) -> Iterator[str]:
    """Places cited in `text` whose document is neither published nor part of the repository."""
    flat = re.sub(r"\s*\n\s*(?:# )?", " ", text)
    for place in PLACE.finditer(flat):
        before = flat[max(0, place.start() - REACH) : place.start()].rpartition(";")[2]
        if not PUBLIC.search(before):
            yield flat[max(0, place.start() - 60) : place.end()]


def test_cited_anchors_exist() -> None:
    wrong = [f"{path.relative_to(ROOT)}: {found}" for path, text in texts() for found in dangling(path, text)]
    assert not wrong, "no such document or anchor:\n" + "\n".join(wrong)


def test_no_document_outside_the_repository_is_cited() -> None:
    wrong = [f"{path.relative_to(ROOT)}: ...{found}" for path, text in texts() for found in outside(text)]
    assert not wrong, "cite a file of this repository (docs/bagel.md#anchor) or name the paper:\n" + "\n".join(wrong)


def test_the_reference_is_cited() -> None:
    """An empty search would pass the tests above."""
    cited = {anchor for _, text in texts() for name, listed in ANCHORED.findall(text) if name == "docs/bagel.md"
             for anchor in re.findall(r"#[\w-]+", listed)}  # fmt: skip
    assert len(cited) >= 20, sorted(cited)


@pytest.mark.parametrize(
    "text",
    [
        "as docs/bagel.md#no-such-anchor has it",
        "see docs/bagel.md#rope, #no-such-anchor",
        "see docs/absent.md",
        "[there](absent.md#rope)",
    ],
)
def test_dangling_citations_are_found(text: str) -> None:
    assert len(list(dangling(ROOT / "docs" / "architecture.md", text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "(BAGEL section 2; notes-reference sections 8 and 9)",
        "(architecture, ideas 2 and 3)",
        "as the design's § 4 has",
        "moves by one (notes-reference\n    section 6)",
    ],
)
def test_outside_citations_are_found(text: str) -> None:
    assert len(list(outside(text))) == 1
