"""Turn the HTML pages of Debian's package gimp-help-en into shards: tutorials as interleaved documents, and their text.

    apt-get install --no-install-recommends gimp-help-en      # 685 pages with about 2,000 images
    python tools/build_web_documents.py --out runs/real/documents

    documents-*.tar   interleaved documents of 3 to 8 images that passed the rules of megabagel/curation/web.py
    texts-*.tar       the text of all pages, images or not, in parts of at most 2,000 characters
    tokenizer.json    a byte-level BPE of 4,096 ids trained on these texts

Any folder of English HTML pages with their images will do (`--pages`). Equal pages give equal bytes.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from megabagel.curation import web
from megabagel.curation.draft import Draft, plain_key
from megabagel.curation.read.html_page import read_page
from megabagel.curation.samples import interleaved, text_parts, write_corpus
from megabagel.curation.steps import Bound, Tally, run_steps, table_of
from megabagel.data.files import write_atomic
from megabagel.data.tokenize.bpe import train_bpe
from megabagel.errors import UserError

PAGES = Path("/usr/share/gimp/2.0/help/en")
LONGEST_TEXT = 2000
"""Characters of one text sample."""
VOCABULARY = 4096
SAMPLES_PER_SHARD = 200
DOCUMENT_STEPS = (
    Bound(web.interface_images),
    Bound(web.missing_files),
    Bound(web.damaged_files),
    Bound(web.image_sides),
    Bound(web.aspect_ratio),
    Bound(web.image_clarity, {"side": 0}),
    Bound(web.repeated_images),
    Bound(web.english),
    Bound(web.too_few_images),
    Bound(web.long_documents_split),
)
TEXT_STEPS = (Bound(web.english), Bound(web.too_few_words))


def main(words: list[str] | None = None) -> int:
    """Build the corpus and print what became of every page and image."""
    parser = argparse.ArgumentParser(description="Turn installed HTML pages into WebDataset shards.")
    parser.add_argument("--out", type=Path, default=Path("runs/real/documents"), help="default: %(default)s")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of pages (default: %(default)s)")
    arguments = parser.parse_args(words)
    try:
        print(build(arguments.pages, arguments.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(pages: Path, out: Path) -> str:
    """Write the shards and the tokenizer into `out`; return the report.

    Raises:
        UserError: no pages there, none is left, or `out` cannot be used.
    """
    paths = sorted(pages.rglob("*.html"))
    if not paths:
        raise UserError(f"{pages}: no HTML pages there. Install them: apt-get install gimp-help-en")
    drafts = list(read_pages(pages, paths, raw := Tally("pages")))
    documents, on_documents = passed(drafts, DOCUMENT_STEPS)
    texts, on_texts = passed(drafts, TEXT_STEPS)
    samples = {
        "documents": [interleaved(draft) for draft in documents],
        "texts": [sample for draft in texts for sample in text_parts(draft, LONGEST_TEXT)],
    }
    tables = [table_of(on_documents), "", table_of(on_texts)]
    if empty := [kind for kind, found in samples.items() if not found]:
        raise UserError("\n".join([f"{pages}: no {empty[0]} are left after the filters.", *tables]))
    shards = write_corpus(out, samples, SAMPLES_PER_SHARD)
    tokenizer = train_bpe([files["txt"].decode() for _, files in samples["texts"]], VOCABULARY)
    write_atomic(out / "tokenizer.json", tokenizer.encode())
    in_content = on_documents[0].pictures_in
    pages_line = f"pages: {raw.documents_in}, images on them: {raw.pictures_in}, in their main content: {in_content}"
    sizes = [f"{path}: {path.stat().st_size / 1e6:.1f} MB" for path in shards]
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in samples.items())
    return "\n".join([pages_line, "", *tables, "", f"samples: {counts}", *sizes])


def passed(drafts: list[Draft], steps: Sequence[Bound]) -> tuple[list[Draft], list[Tally]]:
    """The documents that pass all steps, and the counts of each."""
    tallies = [Tally(bound.step.name) for bound in steps]
    return list(run_steps(drafts, steps, tallies)), tallies


def read_pages(root: Path, paths: list[Path], raw: Tally) -> Iterator[Draft]:
    """The main content of every page; `raw` counts all of it."""
    read = lru_cache(maxsize=None)(_read)
    for number, path in enumerate(paths):

        def load(source: str, folder: Path = path.parent) -> bytes | None:
            return read(root, folder / unquote(urlsplit(source).path)) if not urlsplit(source).scheme else None

        page = read_page(f"{number:06d}-{plain_key(path.stem)}", path.read_text("utf-8", errors="replace"), load)
        raw.documents_in += 1
        raw.pictures_in += page.images
        yield page.draft


def _read(root: Path, path: Path) -> bytes | None:
    """The file, if it lies under `root`."""
    path = path.resolve()
    return path.read_bytes() if path.is_relative_to(root.resolve()) and path.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
