"""The commands of docs/srum.md: all can be parsed, and the chain runs on a model of two training steps."""

import json
import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest

from megabagel.cli import _parser
from megabagel.config.load import dump, load
from megabagel.config.schema import RunConfig
from tests.support.cli_harness import TINY, command, metrics, pairs, tiny_run
from tests.support.config_tree import change

PAGE = Path(__file__).parents[2] / "docs" / "srum.md"


def documented() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    return [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("megabagel ")]


def test_every_documented_command_can_be_parsed() -> None:
    assert len(documented()) >= 7
    for words in documented():
        _parser().parse_args(words)
        assert all(Path(PAGE.parents[1] / word).is_file() for word in words if word.startswith("examples/"))


@pytest.mark.thorough
def test_the_documented_chain_runs(tmp_path: Path) -> None:
    """Each command of the page in order, on a small model, in a folder of the test; then once more: nothing is left."""
    base = tiny_run(tmp_path / "base", pairs(8))
    command("train", base).succeeded()
    work, small = tmp_path / "work", tmp_path / "small.yaml"
    source = {"name": "own", "path": "train.jsonl", "images": "images", "task": "reward"}
    config = change(load(base), {"run": RunConfig(dir=str(tmp_path / "run")), "train.steps": 2})
    dump(config, small)
    start = tmp_path / "base" / "run" / "checkpoints" / "step_00000002"
    replaced = {
        "runs/scenes": str(tmp_path / "base" / "run"),
        "scenes:192": "scenes:6",
        "runs/srum/round_1": str(work),
        "64x64": "32x32",
        "25": "3",
        "examples/configs/srum_demo.yaml": str(small),
        "data.root=runs/srum/round_1": f"data.root={work}",
        "run.init_from=runs/scenes/checkpoints/step_00003000": f"run.init_from={start}",
    }
    for turn in range(2):
        for words in takewhile(lambda words: words[1] != "run", documented()):
            given = [replaced.get(word, word) for word in words]
            if words[0] == "train":
                listed = json.dumps([source])
                given += [f"data.sources={listed}", "data.vae_resize.max_size=32"]
            out = command(*given).succeeded().out
            if words[1] in ("generate", "boxes", "judge") and turn:
                assert "drawn: 0" in out or "pictures: 0" in out, out
    assert len((work / "train.jsonl").read_text().splitlines()) == 6 and (work / "show.html").is_file()
    assert len(metrics(tmp_path / "run")) == TINY.train.steps
