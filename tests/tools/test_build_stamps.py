import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest
from build_stamps import main

from megabagel.data.index.index import build_index, find_shards
from megabagel.data.tokenize.tokenizer import ByteTokenizer

TOOL = Path(__file__).parents[2] / "tools" / "build_stamps.py"


def build(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)


def test_english_captions_and_one_file_per_stamp(stamps: Path, tmp_path: Path) -> None:
    result = build("--stamps", stamps, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    index = build_index(find_shards(tmp_path / "out", "stamps-*.tar"), ByteTokenizer(), "t2i")
    found = {index.text(document.texts[0]): document.images[0] for document in index.documents}
    assert index.read(found["A frog."].member) == (stamps / "animals" / "frog.png").read_bytes()
    drawn = util.find_spec("resvg_py") is not None
    if drawn:
        assert (found["A red hat."].width, found["A red hat."].height) == (512, 256)
    words = [line.split() for line in result.stdout.splitlines()]
    documents = {" ".join(line[:-6]): line[-6:-3] for line in words if len(line) > 6 and line[-1].isdecimal()}
    left = 3 + drawn
    assert documents == {  # in, out, dropped; the SVG of the frog is not drawn, there is a PNG
        "missing captions": ["5", "4", "1"],
        "undrawn SVGs": ["4", str(left), str(4 - left)],
        "damaged files": [str(left), str(left - 1), "1"],
        "repeated pairs": [str(left - 1), str(left - 2), "1"],
    }


def test_equal_stamps_give_equal_bytes(stamps: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b")]
    assert [main(["--stamps", str(stamps), "--out", str(out)]) for out in outs] == [0, 0]
    assert (outs[0] / "stamps-000000.tar").read_bytes() == (outs[1] / "stamps-000000.tar").read_bytes()


def test_a_missing_package_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stamps", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "apt-get install tuxpaint-stamps-default" in capsys.readouterr().err
