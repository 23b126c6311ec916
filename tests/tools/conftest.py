"""Small folders laid out like the packages that the builders read; the tools are on the path, as when one runs."""

import sys
from pathlib import Path

import pytest

from tests.support.pictures import file_of, noise

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

SENTENCE = "<p>This is what you see in the picture, and it is easy to use for a beginner.</p>"
SVG = b"""<svg width="20mm" height="10mm" viewBox="0 0 2 1" xmlns="http://www.w3.org/2000/svg">
<rect width="1" height="1" fill="red"/></svg>"""


@pytest.fixture
def stamps(tmp_path: Path) -> Path:
    """A folder laid out like the package."""
    files = {
        "animals/frog.png": file_of(noise(20, 10, "RGBA")),
        "animals/frog.txt": "A frog.\nde.utf8=Ein Frosch.\nel.utf8=Βάτραχος.\n".encode(),
        "animals/frog.svg": SVG,
        "animals/frog.ogg": b"quack",
        "animals/frog_mirror.png": file_of(noise(20, 10)),
        "animals/frog_copy.png": file_of(noise(20, 10, "RGBA")),
        "animals/frog_copy.txt": b"A frog.\n",
        "half.png": file_of(noise(64, 64))[:3000],
        "half.txt": b"A half.",
        "hat.svg": SVG,
        "hat.txt": b"=A red hat.\n",
        "hat.dat": b"noflip\n",
    }
    for name, data in files.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "stamps"


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    """Two pages with images, one with text alone, one of navigation."""
    root = tmp_path / "pages"
    (root / "sub").mkdir(parents=True)
    for number in range(4):
        (root / f"my picture{number}.png").write_bytes(file_of(noise(200, 160, seed=number)))
    (root / "photo").write_bytes(file_of(noise(160, 200), "JPEG"))
    images = [f"<img src='my%20picture{n}.png?v=1'>{SENTENCE}" for n in range(4)]
    (root / "first.html").write_text(f"<div class=navheader><img src=x.png></div>{''.join(images)}{SENTENCE * 4}")
    (root / "sub" / "über.html").write_text(
        f"{SENTENCE}<img src=../photo><img src=../../secret.png>{SENTENCE}<img src='http://a.org/b.png'>"
        f"<img src='../my picture1.png'><img src='../my%20picture2.png'>"
    )
    (root / "text.html").write_text("<h1>Title</h1>" + SENTENCE * 200)
    (root / "toc.html").write_text("<div class=toc><a>one</a></div>")
    (tmp_path / "secret.png").write_bytes(file_of(noise(200, 200, seed=9)))
    return root
