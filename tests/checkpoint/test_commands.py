"""The commands on checkpoints: what they print and their exit codes."""

import json
import re
import shutil
from pathlib import Path

import pytest

from megabagel.cli import main
from tests.support.checkpoint_states import config_on, write
from tests.support.corruptions import FIRST, flip
from tests.support.rank_pool import RankPool

KEY = "weight/layers.0.attention.und.q.weight"


@pytest.fixture(scope="module")
def two(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run to the same step on two grids; fp32 sums are rounded differently."""
    folders = []
    for grid in ((2, 1, 1, 1, 1), (1, 1, 1, 1, 1)):
        folder = tmp_path_factory.mktemp("run")
        config, size = config_on(grid, folder)
        ranks.run(size, write, config)
        folders.append(folder / "checkpoints/step_00000002")
    return folders[0], folders[1]


def test_inspect(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(two[0])]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^step      2$", text, re.M) and re.search(
        r"^grid      tp 2 x pp 1 x cp 1 x dp 1 x vpp 1$", text, re.M
    )
    assert re.search(r"^versions  .*torch \d.*commit ", text, re.M)
    assert re.search(rf"^{re.escape(KEY)} +F32 +128 x 64 +32,768 bytes +2 boxes$", text, re.M)
    assert main(["checkpoint", "inspect", str(two[0]), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["step"] == 2 and about["tensors"][KEY] == {
        "shape": [128, 64], "dtype": "F32", "bytes": 32768, "boxes": 2, "files": 2
    }  # fmt: skip


def test_verify(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "verify", str(two[0])]) == 0
    assert "whole: step 2, 6 files" in capsys.readouterr().out
    damaged = Path(shutil.copytree(two[0], tmp_path / "damaged"))
    flip(damaged / FIRST, -100)
    assert main(["checkpoint", "verify", str(damaged)]) == 2
    assert f"{damaged / FIRST}: was changed" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert "no complete checkpoint there" in capsys.readouterr().err


def test_diff(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "diff", str(two[0]), str(two[0])]) == 0
    assert "equal in every bit" in capsys.readouterr().out
    assert main(["checkpoint", "diff", *map(str, two)]) == 1
    lines = capsys.readouterr().out.splitlines()
    worst = re.fullmatch(r"  (\S+): ([\d,]+) numbers, by at most (\S+) absolute, (\S+) relative", lines[1])
    assert worst and 0 < float(worst[3]) < 1e-2


@pytest.mark.parametrize("words", ["inspect HERE", "verify HERE", "diff HERE HERE", "reshard HERE OUT"])
def test_a_mistyped_folder(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = tmp_path / "mistyped"
    command = words.replace("HERE", str(here)).replace("OUT", str(tmp_path / "out")).split()
    assert main(command if command[0] == "reshard" else ["checkpoint", *command]) == 2
    said = capsys.readouterr().err
    assert f"{here}: no complete checkpoint there" in said and "RUN/checkpoints/step_" in said
    assert "run.resume" not in said


def test_diff_finds_one_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a number that is not finite too."""
    import torch

    from megabagel.checkpoint.lazy import LazyTensor
    from megabagel.checkpoint.lazy import write as write_tensors
    from megabagel.checkpoint.manifest import write_manifest
    from megabagel.config.schema import ModelConfig

    numbers = torch.tensor([[1.0, -2.0], [0.0, torch.inf], [torch.nan, 4.0]])
    others = torch.tensor([[1.0, -2.5], [-0.0, torch.inf], [torch.nan, 4.0]])
    for name, tensor in (("a", numbers), ("b", others), ("c", torch.tensor([[1.0, -2], [0, 1], [torch.nan, 4]]))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
        lazy = LazyTensor((3, 2), torch.float32, lambda tensor=tensor: (tensor[:2], tensor[2:]))
        sums = write_tensors(tmp_path / name, {"weight/x": lazy})
        write_manifest(tmp_path / name, ModelConfig(), sums, step=0, grid={}, ema=0.0, freeze=())
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "weight/x: 2 numbers, by at most 0.5 absolute, 0.2 relative" in capsys.readouterr().out
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 1
    assert "weight/x: 1 numbers, by at most inf absolute, inf relative" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.dp=2"], "parallel.dp=2: expected parallel.tp, pp, vpp or cp"),
        (["parallel.tp=0"], "parallel.tp=0: expected"),
        (["parallel.tp=3"], "does not fit this grid"),
        (["--drop", "weights"], "--drop weights: expected optimizer, ema"),
    ],
)
def test_reshard_refuses(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["reshard", str(two[0]), str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reshard(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["reshard", str(two[0]), str(out), "parallel.pp=2", "--dp", "2"]) == 0
    assert f"{out}: written as tp 2 x pp 2 x vpp 1 x cp 1 x dp 2" in capsys.readouterr().out
    assert len(list(out.glob("rank_*.safetensors"))) == 8
    assert main(["checkpoint", "diff", str(two[0]), str(out)]) == 0
    assert main(["reshard", str(two[0]), str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
