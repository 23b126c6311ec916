"""A checkpoint from any grid goes on on any other: states bitwise equal, the same data, losses as if nothing happened.

python -m tests.checkpoint.test_reshard        all pairs below, as a table for docs/checkpoints.md
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megabagel.config.schema import RunConfig
from tests.support.checkpoint_states import AFTER, Grid, Life, config_on, read, whole, write
from tests.support.config_tree import change
from tests.support.rank_pool import RankPool

GRIDS: tuple[Grid, ...] = (  # tp, pp, vpp, cp, dp
    (1, 1, 1, 1, 1),
    (2, 1, 1, 1, 1),
    (1, 2, 1, 1, 1),
    (1, 2, 2, 1, 1),
    (1, 1, 1, 2, 1),
    (1, 1, 1, 1, 3),
    (2, 2, 1, 1, 1),
    (1, 1, 1, 1, 2),
)


def pairs(*strides: int) -> list[tuple[Grid, Grid]]:
    """Every grid with the ones that follow it at these distances: (written, read)."""
    return [(grid, GRIDS[(number + by) % len(GRIDS)]) for by in strides for number, grid in enumerate(GRIDS)]


QUICK, REST = pairs(3)[::2], [*pairs(3)[1::2], *pairs(1, 2, 5)]


@dataclass(frozen=True)
class Bench:
    """Runs the scenario; each grid writes once."""

    ranks: RankPool
    root: Path
    shapes: Path
    written: dict[Grid, list[Life]]

    def write(self, grid: Grid) -> list[Life]:
        if grid not in self.written:
            config, size = config_on(grid, self.folder(grid))
            self.written[grid] = self.ranks.run(size, write, config, str(self.shapes))
        return self.written[grid]

    def read(self, written: Grid, grid: Grid) -> list[Life]:
        config, size = config_on(grid, self.root)
        config = change(config, {"run": RunConfig(dir=str(self.folder(written)))})
        return self.ranks.run(size, read, config, str(self.shapes))

    def compare(self, written: Grid, opened: Grid) -> float:
        """Assert that nothing changes; the largest relative difference of a loss."""
        first, second = self.write(written), self.read(written, opened)
        before, after = whole(first), whole(second)
        assert before.keys() == after.keys()
        for key, expected in before.items():
            assert np.array_equal(after[key], expected), key
        assert order(second) == order(first)
        worst = 0.0
        for theirs, mine in zip(first[0].losses, second[0].losses, strict=True):
            worst = max(worst, abs(mine - theirs) / theirs)
        assert len(second[0].losses) == AFTER and worst < 1e-5
        return worst

    def folder(self, grid: Grid) -> Path:
        return self.root / "-".join(map(str, grid))


def order(lives: list[Life]) -> dict[tuple[int, int], list[tuple[str, int, int]]]:
    """The data of all ranks."""
    found = {place: keys for life in lives for place, keys in life.order.items()}
    assert len(found) == AFTER * 6
    return found


@pytest.fixture(scope="module")
def bench(ranks: RankPool, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, tmp_path_factory.mktemp("matrix"), shapes, {})


def test_the_run_is_worth_comparing(bench: Bench) -> None:
    lives = bench.write(GRIDS[0])
    states = whole(lives)
    assert {key.split("/")[0] for key in states} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    assert "weight/layers.4.attention.gen.k.weight" in states
    assert len(set(lives[0].losses)) == AFTER and len({str(keys) for keys in order(lives).values()}) == AFTER * 6


@pytest.mark.parametrize(("written", "opened"), QUICK, ids=str)
def test_another_grid(bench: Bench, written: Grid, opened: Grid) -> None:
    bench.compare(written, opened)


@pytest.mark.parametrize("grid", [(1, 2, 2, 1, 1), (1, 1, 1, 1, 3)], ids=str)
def test_reshard_writes_what_the_grid_writes(bench: Bench, tmp_path: Path, grid: Grid) -> None:
    """The same boxes in the same files; only where data-parallel shares begin is the optimizer's own affair."""
    bench.write(GRIDS[1])
    bench.write(grid)
    source, real = (bench.folder(g) / "checkpoints/step_00000002" for g in (GRIDS[1], grid))
    changes = dict(zip(("tp", "pp", "vpp", "cp", "dp"), grid, strict=True))
    (found,) = bench.ranks.run(1, resharded, source, tmp_path / "out", changes, ())
    assert found == []
    if grid[-1] == 1:
        assert boxes_in(tmp_path / "out") == boxes_in(real)
    else:
        assert {box[0] for box in boxes_in(tmp_path / "out")} == {box[0] for box in boxes_in(real)}
        sizes = [(tmp_path / "out" / f"rank_{rank:05d}.safetensors").stat().st_size for rank in range(3)]
        assert max(sizes) < 1.1 * min(sizes)
    assert json.loads((tmp_path / "out/state.json").read_text()) == json.loads((real / "state.json").read_text())


def resharded(source: Path, out: Path, changes: dict[str, int], drop: tuple[str, ...]) -> list[str]:
    """Reshard; in what the result differs from the source."""
    from megabagel.checkpoint.describe import differences
    from megabagel.checkpoint.reader import verify
    from megabagel.checkpoint.reshard import reshard

    reshard(source, out, changes, drop)
    verify(out)
    return [difference.key for difference in differences(source, out)]


def boxes_in(folder: Path) -> set[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """(file, key, offset, shape) of every box."""
    index = json.loads((folder / "index.json").read_text())
    return {
        (file, key, tuple(offset), tuple(shape))
        for key, entry in index.items()
        for file, offset, shape, _ in entry["boxes"]
    }


@pytest.mark.parametrize(
    ("drop", "kinds"),
    [
        (("optimizer", "ema"), {"weight"}),
        (("ema",), {"weight", "exp_avg", "exp_avg_sq"}),
        (("optimizer",), {"weight", "ema"}),
    ],
)
def test_reshard_leaves_out(bench: Bench, tmp_path: Path, drop: tuple[str, ...], kinds: set[str]) -> None:
    bench.write(GRIDS[1])
    source = bench.folder(GRIDS[1]) / "checkpoints/step_00000002"
    (found,) = bench.ranks.run(1, resharded, source, tmp_path / "out", {}, drop)
    assert {box[1].split("/")[0] for box in boxes_in(tmp_path / "out")} == kinds
    assert {key.split("/")[0] for key in found} == {"weight", "exp_avg", "exp_avg_sq", "ema"} - kinds
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["seed"] is None) == ("optimizer" in drop) and (manifest["ema"] == 0) == ("ema" in drop)


@pytest.mark.thorough
@pytest.mark.parametrize(("written", "opened"), REST, ids=str)
def test_one_more_grid(bench: Bench, written: Grid, opened: Grid) -> None:
    bench.compare(written, opened)


def main() -> None:
    """Print the table."""
    from tests.support.small_run import write_data

    with tempfile.TemporaryDirectory() as name:
        write_data(Path(name) / "shapes")
        bench = Bench(RankPool(), Path(name), Path(name) / "shapes", {})
        print("| written by (tp, pp, vpp, cp, dp) | read by | states | data | worst of 5 losses |")
        print("| --- | --- | --- | --- | --- |")
        for written, opened in QUICK + REST:
            worst = bench.compare(written, opened)
            print(f"| {written} | {opened} | equal bits | equal | {worst:.1e} |", flush=True)
        bench.ranks.close()


if __name__ == "__main__":
    main()
