"""Reports of throughput: what they compute, say, draw and compare; sweeps; the stopwatch beneath."""

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megabagel.bench.chart import draw
from megabagel.bench.compare import compare
from megabagel.bench.report import Measurement, document, read, table, write
from megabagel.bench.stopwatch import Stopwatch
from megabagel.bench.sweep import Grid, read_sweep
from megabagel.errors import UserError

ONE = Measurement(
    name="a tp2",
    config={"train": {"lr": 0.1}, "model": {"layers": 4}},
    world=2,
    grid={"tp": 2, "pp": 1, "vpp": 1, "cp": 1, "dp": 1},
    device="CPU",
    batches="real",
    peak_flops=1e12,
    peak_source="telemetry.peak_tflops",
    steps=[0.5, 9.0, 0.4],
    tokens=3000,
    tokens_und=1000,
    tokens_gen=2000,
    rows=4000,
    samples=20,
    flops={"official": 4e11, "masked": 3e11, "vit": 1e9, "vae": 2e9},
    phases={"data": 0.1, "forward": 0.2, "backward": 0.3},
    phased_step=0.6,
    busy=[1.0, 2.0],
    planned=1.1,
    memory_peak=[3 << 20, 5 << 20],
    memory_steady=[1 << 20, 2 << 20],
    versions={"torch": "2.13.0"},
    commit="abc",
    date="2026-11-21",
)


def test_rates_are_of_the_median_step_and_one_rank() -> None:
    assert ONE.seconds == 0.5
    assert ONE.tokens_per_s == 3000 / 0.5 / 2
    assert ONE.samples_per_s == 40
    assert ONE.tflops("masked") == pytest.approx(0.3)  # 3e11 FLOP / 0.5 s / 2 ranks
    assert ONE.mfu("official") == pytest.approx(0.4)
    assert ONE.padding == 0.25
    assert ONE.imbalance == pytest.approx(2 / 1.5)


def test_table_has_a_column_per_measurement() -> None:
    lines = table([ONE, replace(ONE, name="b", tokens_und=0)]).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if line}
    assert cells["tokens/s per rank"] == ["3,000", "3,000"]
    assert cells["und : gen tokens"] == ["1 : 2.00", "0 : 1"]
    assert cells["memory, peak (MiB)"] == ["5", "5"]
    assert cells["forward, s"] == ["0.200 (33%)", "0.200 (33%)"]


def test_document_names_what_was_measured() -> None:
    text = document([ONE], "bench.svg")
    for words in ("2026-11-21", "commit abc", "torch 2.13.0", "1e+12 FLOP/s", "(bench.svg)", "1.20 times as long"):
        assert words in text


def test_written_and_read_again(tmp_path: Path) -> None:
    write([ONE, replace(ONE, name="b")], tmp_path / "deep" / "bench.json")
    assert read(tmp_path / "deep" / "bench.json") == [ONE, replace(ONE, name="b")]


NO_RESULTS = ["", "{}", "[1]", '{"format": 2}', '{"format": 1, "measurements": [{"name": "a"}]}']


@pytest.mark.parametrize("content", NO_RESULTS)
def test_a_file_that_is_no_result(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: not a result of `megabagel bench`"):
        read(tmp_path / "a.json")


def test_picture_is_well_formed_and_names_every_bar() -> None:
    root = ElementTree.fromstring(draw([ONE, replace(ONE, name="b <&> c")]))
    words = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words.count("a tp2") == words.count("b <&> c") == 2  # in both halves
    assert {"data", "forward", "backward"} <= set(words)
    widths = [float(node.get("width", 0)) for node in root.iter("{http://www.w3.org/2000/svg}rect")]
    assert min(widths) >= 0
    assert max(widths) <= float(root.get("width", 0))


def test_comparison_gives_ratios_and_what_else_differs() -> None:
    faster = replace(ONE, steps=[0.25], config={"train": {"lr": 0.2}, "model": {"layers": 4}}, commit="def")
    lines = [" ".join(line.split()) for line in compare([ONE], [faster]).splitlines()]
    assert "tokens/s per rank 3,000 6,000 x 2.000" in lines
    assert "step, s 0.5 0.25 x 0.500" in lines
    assert lines[-2:] == ["train.lr: 0.1 -> 0.2", "commit: abc -> def"]


def test_comparison_matches_grids_by_name() -> None:
    b = replace(ONE, name="b")
    assert compare([ONE, b], [b]).splitlines()[0] == "b"
    assert compare([ONE], [b]).splitlines()[0] == "a tp2 -> b"  # one each: compared whatever their names
    with pytest.raises(UserError, match="A has a tp2, b, B has c"):
        compare([ONE, b], [replace(ONE, name="c")])


def test_stopwatch_counts_for_the_innermost_phase() -> None:
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    with watch.phase("step"):
        tick(1)
        with watch.phase("forward"):
            tick(2)
            with watch.phase("wait"):
                tick(4)
            tick(8)
        tick(16)
    tick(32)
    with watch.phase("step"):
        tick(64)
    assert watch.seconds == {"step": 81, "forward": 10, "wait": 4}


def test_stopwatch_goes_on_after_an_error() -> None:
    now = [0.0]
    watch = Stopwatch(clock=lambda: now[0])
    with watch.phase("step"):
        with pytest.raises(ZeroDivisionError), watch.phase("forward"):
            now[0] += 1
            1 / 0  # noqa: B018
        now[0] += 2
    assert watch.seconds == {"forward": 1, "step": 2}


def test_sweep(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "grids:\n  - {nproc: 1}\n  - {nproc: 2, parallel.tp: 2, parallel.layer_split: [3, 1], data.index_dir: null}\n"
    )
    assert read_sweep(tmp_path / "s.yaml") == [
        Grid(1, ()),
        Grid(2, ("parallel.tp=2", "parallel.layer_split=[3, 1]", "data.index_dir=null")),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no list `grids`"),
        ("grids: []", "no list `grids`"),
        ("grids: [1]", "grids.0 = 1"),
        ("grids: [{nproc: 0}]", "grids.0.nproc = 0; expected a number of ranks"),
        ("grids: [{}, {nproc: true}]", "grids.1.nproc = True"),
        ("grids: [", "cannot be read"),
    ],
)
def test_bad_sweep(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        read_sweep(tmp_path / "s.yaml")
    assert says in str(error.value)
    assert "s.yaml" in str(error.value)
