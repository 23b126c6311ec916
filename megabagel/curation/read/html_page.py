"""A web page as a document: the text and the images of its main content, in order.

Tolerant as browsers are: tags that are never closed, stray end tags and unknown elements lose no text.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser

from megabagel.curation.draft import Draft, Item, Picture, Text, joined, tidy

LEFT_OUT = frozenset((
    "aside", "button", "footer", "form", "head", "header", "iframe", "nav", "noscript", "script", "select", "style",
    "svg", "template",
))  # fmt: skip
"""Elements without main content."""
LEFT_OUT_CLASSES = frozenset((
    "breadcrumbs", "index", "legalnotice", "navbar", "navfooter", "navheader", "sidebar", "toc",
))  # fmt: skip
"""Classes of blocks without main content, DocBook's among them."""
BLOCKS = frozenset((
    "address", "article", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt", "fieldset", "figcaption",
    "figure", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "main", "ol", "p", "pre", "section", "summary", "table",
    "tbody", "tfoot", "thead", "tr", "ul",
))  # fmt: skip
"""Elements that begin and end a paragraph."""
VOID = frozenset(["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"])
"""Elements without an end tag."""
TABLE = frozenset(["table"])
ENDED_BY: dict[str, frozenset[str]] = {
    "p": BLOCKS | {"aside", "footer", "form", "header", "nav"},
    "li": frozenset(["li"]),
    "dt": frozenset(["dt", "dd"]),
    "dd": frozenset(["dt", "dd"]),
    "td": frozenset(["td", "th", "tr", "tbody", "tfoot", "thead"]),
    "th": frozenset(["td", "th", "tr", "tbody", "tfoot", "thead"]),
    "tr": frozenset(["tr", "tbody", "tfoot", "thead"]),
}
"""Elements whose end tag may be left out, and the elements that cannot begin inside them and so end them."""
AROUND = {"li": frozenset(["ul", "ol"]), "dt": frozenset(["dl"]), "dd": frozenset(["dl"])}
"""An element of ENDED_BY is not ended from within one of these that began inside it; by default, from a table."""
CROSSED = BLOCKS | LEFT_OUT | {"li", "td", "th"}
"""Elements whose end tag ends whatever is open inside them, up to a table; no other end tag reaches beyond them."""


@dataclass(frozen=True)
class Page:
    """What a page holds: its main content, and how many images it has in all, those of navigation included."""

    draft: Draft
    images: int


def read_page(key: str, html: str, load: Callable[[str], bytes | None], source: str = "") -> Page:
    """Read one page.

    Args:
        key: key of the document.
        html: the page.
        load: returns the file behind the `src` of an image, None if there is none.
        source: where the page is from.
    """
    reader = _Reader(load)
    reader.feed(html)
    reader.close()
    reader.flush()
    return Page(Draft(key, joined(reader.items), source), reader.images)


class _Reader(HTMLParser):
    """Collects `items`; `text` is the text since the last image."""

    def __init__(self, load: Callable[[str], bytes | None]) -> None:
        super().__init__(convert_charrefs=True)
        self.load = load
        self.items: list[Item] = []
        self.images = 0
        self.text = ""
        self.open: list[str] = []  # elements that have begun, the innermost last
        self.skipped: int | None = None  # which of these is left out with all inside it
        self.preformatted = 0
        self.lists: list[int | None] = []  # per open list: the next number, None if it has bullets
        self.row_begins = False

    def flush(self) -> None:
        """Close the current text."""
        if self.text:
            self.items.append(Text(tidy(self.text)))
        self.text = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """<br/> and its like; other empty elements, such as <a id="x"/>, say nothing."""
        if tag in VOID:
            self.handle_starttag(tag, attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin an element."""
        self.images += tag == "img"
        values = dict(attrs)
        self._end_before(tag)
        if tag not in VOID:
            self.open.append(tag)
        if self.skipped is not None:
            return
        if tag not in VOID and (tag in LEFT_OUT or LEFT_OUT_CLASSES & set((values.get("class") or "").split())):
            self.skipped = len(self.open) - 1
        elif tag == "img":
            source = values.get("src") or ""
            self.flush()
            self.items.append(Picture(source, self.load(source), alt=" ".join((values.get("alt") or "").split())))
        elif tag == "br":
            self.text += "\n"
        else:
            self._begin(tag)

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        ended = self._ended_by(tag)
        was_skipped = self.skipped is not None and (ended is None or self.skipped <= ended)
        if ended is not None:
            self._end(ended)
        if was_skipped:
            return
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()
        elif tag == "pre":
            self.preformatted = max(0, self.preformatted - 1)
        if tag in BLOCKS:
            self._paragraph()

    def handle_data(self, data: str) -> None:
        """Text: white space collapses, except in <pre>."""
        if self.skipped is not None:
            return
        if not self.preformatted:
            data = re.sub(r"\s+", " ", data)
            if not self.text[-1:].strip():  # at the beginning, or after white space
                data = data.lstrip() if self.text or not self.items else data
        self.text += data

    def _end_before(self, tag: str) -> None:
        """End what `tag` cannot stand in: its end tag was left out."""
        if "head" in self.open and (tag == "body" or (self.open[-1] == "head" and tag in BLOCKS)):
            self._end(self.open.index("head"))
        for name in (name for name, enders in ENDED_BY.items() if tag in enders):
            if (place := self._innermost(name, AROUND.get(name, TABLE))) is not None:
                self._end(place)

    def _ended_by(self, tag: str) -> int | None:
        """The place of the element that an end tag ends, None for a stray one."""
        if self.skipped is not None and self.open[self.skipped] == tag:
            return self._innermost(tag, frozenset())
        return self._innermost(tag, TABLE if tag in CROSSED else CROSSED)

    def _innermost(self, tag: str, around: frozenset[str]) -> int | None:
        """The place of the innermost open `tag`, None if one of `around` has begun inside it."""
        for place in reversed(range(len(self.open))):
            if self.open[place] == tag:
                return place
            if self.open[place] in around:
                return None
        return None

    def _end(self, place: int) -> None:
        """End an open element and all inside it."""
        del self.open[place:]
        if self.skipped is not None and self.skipped >= place:
            self.skipped = None

    def _begin(self, tag: str) -> None:
        if tag in BLOCKS:
            self._paragraph()
        if tag in ("ul", "ol"):
            self.lists.append(1 if tag == "ol" else None)
        elif tag == "li":
            self.text = self.text.rstrip() + "\n" + self._marker()
        elif tag == "tr":
            self.row_begins = True
        elif tag in ("td", "th"):
            if not self.row_begins and self.text.strip():
                self.text = self.text.rstrip() + " | "
            self.row_begins = False
        elif tag == "pre":
            self.preformatted += 1

    def _marker(self) -> str:
        number = self.lists[-1] if self.lists else None
        if number is None:
            return "- "
        self.lists[-1] = number + 1
        return f"{number}. "

    def _paragraph(self) -> None:
        """End a paragraph; the mark of a list entry and the border of a cell are no paragraphs of their own."""
        # Only the end is searched: over the whole text the time was quadratic, 1 s for ten long pages.
        end = self.text if len(self.text) <= 32 else f"x{self.text[-32:]}"
        if not re.search(r"(^|\n)(- |\d+\. )$|\| $", end):
            self.text += "\n\n"
