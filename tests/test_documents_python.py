"""Python snippets of the documents run, in order, each page in one process; the public interface keeps its promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megabagel
from tests.support.rank_pool import RankPool
from tests.support.small_run import small_config

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "docs" / "python.md", *sorted((ROOT / "docs" / "howto").glob("*.md")))
    if "```python" in page.read_text()
]


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    script = tmp_path / "snippets.py"
    script.write_text("\n\n".join(snippets(page)))
    ran = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_at_least_six_snippets() -> None:
    assert len(snippets(ROOT / "docs" / "python.md")) >= 6


def test_import_loads_no_torch_and_every_name_is_there() -> None:
    code = "import sys, megabagel; assert 'torch' not in sys.modules; print(*megabagel.__all__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert {"load_config", "Config", "Bagel", "SingleDevice", "load_pretrained"} <= set(ran.stdout.split())
    for name in megabagel.__all__:
        assert getattr(megabagel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'bagel_'"):
        megabagel.bagel_  # noqa: B018


def weights_of_rank(grid: dict[str, int]) -> dict[str, tuple[tuple[int, ...], torch.Tensor]]:
    """Offset and values of every piece that a rank starts from."""
    from dataclasses import replace

    from megabagel.model.sharding import named_pieces
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.train.build_rank import build_weights

    config = small_config(Path("data"))
    config = replace(config, parallel=replace(config.parallel, **grid))
    stages = build_weights(config, mesh.build(config)).stages
    return {
        piece.name: (piece.offset, piece.view(parameter.detach()).clone())
        for stage in stages
        for piece, parameter in named_pieces(stage.model)
    }


def test_a_model_in_a_notebook_has_the_weights_of_every_rank(ranks: RankPool) -> None:
    from megabagel.model.sharding import named_pieces

    model = megabagel.Bagel(small_config(Path("data")), megabagel.SingleDevice())
    whole = {piece.name: piece.view(parameter.detach()) for piece, parameter in named_pieces(model)}
    for grid in ({}, {"tp": 2}, {"pp": 2}):
        size = 2 if grid else 1
        for held in ranks.run(size, weights_of_rank, grid):
            assert held
            for name, (offset, values) in held.items():
                place = tuple(slice(at, at + extent) for at, extent in zip(offset, values.shape, strict=True))
                assert torch.equal(values, whole[name][place]), (grid, name)
