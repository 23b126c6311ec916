"""The HTML reader on small pages, the odd ones of the wild included."""

import pytest

from megabagel.curation.draft import Draft, Picture, Text, joined
from megabagel.curation.read.html_page import read_page

FILES = {"a.png": b"A", "b.png": b"B"}


def read(html: str) -> list[str]:
    """Texts as they are, pictures as [source]."""
    draft = read_page("key", html, FILES.get).draft
    return [item.text if isinstance(item, Text) else f"[{item.source}]" for item in draft.items]


def text(html: str) -> str:
    return read_page("key", html, FILES.get).draft.text


def test_texts_and_images_in_order() -> None:
    page = read_page("key", "<h1>Title</h1><p>One<img src=a.png>two</p><img src='c.png'/>", FILES.get)
    assert page.draft == Draft(
        "key",
        (Text("\n\nTitle\n\nOne"), Picture("a.png", b"A"), Text("two\n\n"), Picture("c.png", None)),
    )
    assert page.images == 2


def test_navigation_is_left_out_and_its_images_are_counted() -> None:
    html = """<html><head><title>No</title><script>if (a < b) no()</script></head><body>
    <div class="navheader"><div>no<img src="a.png"></div>no</div><nav>no <nav>no</nav> no</nav>
    <div class="big toc">no</div><p>yes</p><footer>no<img src="b.png"></footer></body></html>"""
    page = read_page("key", html, FILES.get)
    assert page.draft.text == "yes" and page.draft.pictures == [] and page.images == 2


@pytest.mark.parametrize(
    ("html", "expected"),
    [
        ("<p>one<p>two", "one\n\ntwo"),
        ("<div>one</p></span></div>two", "one\n\ntwo"),
        ("<ul><li>one<li>two <b>bold</ul>three", "- one\n- two bold\n\nthree"),
        ("<ol><li><p>one</p></li><li><p>two</p></li></ol>", "1. one\n2. two"),
        ("<ol><li>a<ul><li>b</ul><li>c</ol>", "1. a\n- b\n2. c"),
        ("<table><tr><th>a<th>b<tr><td><p>1</p></td><td></td><td>3</td></table>", "a | b\n\n1 | | 3"),
        ("caf&eacute; &amp; &lt;b&gt; &#8594; &nosuch; &", "café & <b> → &nosuch; &"),
        ("one\n   two <i> three</i>  four<br>five", "one two three four\nfive"),
        ("<pre>  (a\n    b)\n</pre>after", "(a\n    b)\n\nafter"),
        ("a<!-- no --><?php no ?>b<unknown>c</unknown>", "abc"),
        ("<p>cut off <b", "cut off <b"),
        ("<html><head><title>no</title><body><p>yes", "yes"),
        ("<head><meta charset=utf-8><title>no</title><h1>yes", "yes"),
        ("<head><noscript><img src=a></noscript><title>no</title></head>yes", "yes"),
        ('<p class="navbar">no<p>yes', "yes"),
        ('<p>a<span class="index">no</p><p>b', "a\n\nb"),
        ("<div><nav>no</div><p>yes</body>", "yes"),
        ("<div><nav><div>no</div>no</span></p>no</nav>yes</div>", "yes"),
        ('<ul><li class="toc">no<ul><li>no</ul>no<li>yes</ul>', "- yes"),
        ('<dl><dt class="toc">no<dd>yes</dl>', "yes"),
        ('<table><tr><td class="toc">no<td>yes<tr><td><nav>no</table>after', "yes\n\nafter"),
        ('<b class="toc">no<div>no</b>yes</div>', "yes"),
        ("", ""),
    ],
)
def test_odd_html(html: str, expected: str) -> None:
    assert text(html) == expected


def test_text_reads_on_where_an_image_is_taken_out() -> None:
    draft = read_page("key", "<p>Click the <img src=a.png> button.</p><p>Then <img src=b.png>", FILES.get).draft
    assert draft.keeping(lambda picture: picture.source == "b.png").items == (
        Text("\n\nClick the button.\n\nThen "),
        Picture("b.png", b"B"),
    )
    assert draft.text == "Click the button.\n\nThen"


def test_an_icon_in_the_first_cell_leaves_no_trace() -> None:
    assert text("<table><tr><td><img src=a.png></td><td>Note</td></tr></table>") == "Note"
    assert read("<ul><li><img src=a.png>one</li></ul>") == ["\n- ", "[a.png]", "one\n\n"]


def test_neighbouring_texts_become_one() -> None:
    assert joined([Text("a "), Text(" b\n\n"), Text("\n\nc"), Picture("x", None), Text("d")]) == (
        Text("a b\n\nc"),
        Picture("x", None),
        Text("d"),
    )
