import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from megabagel.data.index import build_index, find_shards
from megabagel.data.tokenizer import ByteTokenizer
from tests.data.pictures import file_of, noise

TOOL = Path(__file__).parents[2] / "tools" / "build_stamps.py"
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
        "hat.svg": SVG,
        "hat.txt": b"=A red hat.\n",
        "hat.dat": b"noflip\n",
    }
    for name, data in files.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "stamps"


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_english_captions_and_one_file_per_stamp(stamps: Path, tmp_path: Path) -> None:
    result = build("--stamps", stamps, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    index = build_index(find_shards(tmp_path / "out", "stamps-*.tar"), ByteTokenizer(), "t2i")
    found = {index.text(document.texts[0]): document.images[0] for document in index.documents}
    assert index.read(found["A frog."].member) == (stamps / "animals" / "frog.png").read_bytes()
    assert "1 x SVG whose PNG is used, first animals/frog.svg" in result.stdout
    assert "1 x no caption, first animals/frog_mirror.png" in result.stdout
    if util.find_spec("resvg_py"):
        assert (found["A red hat."].width, found["A red hat."].height) == (512, 256)
    else:
        assert "1 x SVG, and no resvg-py to draw it, first hat.svg" in result.stdout


def test_a_missing_package_names_the_command(tmp_path: Path) -> None:
    result = build("--stamps", tmp_path, "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "apt-get install tuxpaint-stamps-default" in result.stderr and "Traceback" not in result.stderr
