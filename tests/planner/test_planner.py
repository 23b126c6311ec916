"""The planner's parts against plain definitions, and its answers to good and bad input."""

import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megabagel import cli
from megabagel.config.load import load, to_dict
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.planner import activations, compute, report
from megabagel.planner.calibration import Calibration, corrected, read_measurements
from megabagel.planner.estimate import Planner
from megabagel.planner.grid import Grid, Precision, grid_of, legal_grids, why_illegal
from megabagel.planner.hardware import CATALOG, find_gpu
from megabagel.planner.memory import GIB, checkpoint_bytes, peak
from megabagel.planner.parameters import count_parts
from megabagel.planner.search import search, what_would_fit
from megabagel.planner.step import stage_phases

EXAMPLES = Path(__file__).parents[2] / "examples"
PT = EXAMPLES / "configs" / "bagel_7b_pt.yaml"
TINY = EXAMPLES / "configs" / "tiny.yaml"
BF16: tuple[Precision, ...] = ("bf16",)


def recipe(*overrides: str) -> Config:
    return load(PT, [f"model.vae.path={PT}", *overrides])


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(recipe(), CATALOG["h200"])


def grid(tp: int, pp: int, cp: int, dp: int, vpp: int = 1, recompute: str = "full") -> Grid:
    return Grid(tp, pp, vpp, cp, dp, recompute, "bf16")  # type: ignore[arg-type]


# Weights


def test_the_model_has_the_published_number_of_weights() -> None:
    """docs/bagel.md#sizes, without the two frozen tables, which are no parameters here."""
    parts = count_parts(recipe().model, 1)
    assert parts.stage(28, True, True).learning == 14_607_260_128 - 14_680_064 - 17_561_600


def test_shards_and_copies_add_up() -> None:
    """What is split lies on one of four ranks, what is not on every one: norms and small linears."""
    model = recipe().model
    one, four = (count_parts(model, tp).layer.learning for tp in (1, 4))
    copied = 2 * (2 * model.hidden + 2 * model.kv_channels)  # two experts, two norms, q and k norms
    assert 4 * four - one == 3 * copied


def test_frozen_weights_are_told_apart() -> None:
    parts = count_parts(recipe().model, 1, ("llm", "vit", "latent"))
    assert parts.stage(28, True, True).learning == 16_980_992  # the connector


# Activations and pipeline


def test_micro_batches_in_flight() -> None:
    planner = Planner(recipe(), CATALOG["h200"])
    plain, interleaved = planner.case(grid(1, 4, 1, 16)), planner.case(grid(1, 4, 1, 16, vpp=7))
    assert [activations.in_flight(plain, rank) for rank in range(4)] == [[4], [3], [2], [1]]
    # 2 (pp - 1) + (vpp - 1) pp + 1 = 31 turns in groups of four
    assert activations.in_flight(interleaved, 0) == [7, 4, 4, 4, 4, 4, 4]
    assert sum(activations.in_flight(interleaved, 3)) == 25


def test_bubble_of_equal_stages(planner: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    """(pp - 1) / (vpp m) of the ideal time (Narayanan et al., section 2.2)."""
    from megabagel.planner import step

    monkeypatch.setattr(step, "stage_phases", lambda *_: {"linears": 1.0})
    for vpp in (1, 7):
        case = planner.case(grid(1, 4, 1, 16, vpp=vpp))
        phases = step.step_time(case, Calibration(slack=0.0)).phases
        assert phases["bubble"] / phases["linears"] == pytest.approx(3 / (vpp * 24))


def test_recomputation_trades_time_for_memory(planner: Planner) -> None:
    modes = [planner.estimate(grid(2, 1, 2, 16, recompute=mode)) for mode in ("none", "selective", "full")]
    assert [m.memory.total for m in modes] == sorted((m.memory.total for m in modes), reverse=True)
    assert [m.time.seconds for m in modes] == sorted(m.time.seconds for m in modes)


def test_tensor_parallel_cannot_be_faster_than_its_share(planner: Planner) -> None:
    """Splitting a GEMM over four ranks takes more than a quarter of its time."""
    one, four = (planner.case(grid(tp, 1, 1, 16)) for tp in (1, 4))
    seconds = [compute.layer(case, Calibration())["linears"].total for case in (one, four)]
    assert seconds[0] / 4 < seconds[1] < seconds[0] / 3


# Search


def test_every_grid_is_legal_and_named_grids_are_among_them() -> None:
    config = recipe()
    grids = list(legal_grids(config, 64, BF16))
    assert {g.gpus for g in grids} == {64}
    assert {g.tp for g in grids} == {1, 2, 4}  # 4 K/V heads
    assert all(config.train.packs_per_step % g.dp == 0 for g in grids)
    assert grid_of(config, 64) in grids
    assert why_illegal(grid(8, 1, 1, 8).apply(config), 64)


def test_what_fits_fits_and_the_first_is_the_fastest(planner: Planner) -> None:
    found = search(planner, 64, BF16)
    assert found.fitting and all(e.memory.gib <= 0.93 * 140.4 for e in found.fitting)
    assert found.fitting[0].time.seconds == min(e.time.seconds for e in found.fitting)
    assert all(e.memory.gib > 0.93 * 140.4 for e in found.too_large)


def test_no_and_what_would_fit() -> None:
    planner = Planner(recipe(), CATALOG["a100"])
    found = search(planner, 2, BF16)
    assert not found.fitting
    text = report.refusal(planner, 2, found, what_would_fit(planner, 2, BF16))
    assert "none of" in text and "of these GPUs would do (tp" in text


def test_a_number_of_gpus_without_a_grid() -> None:
    planner = Planner(recipe(), CATALOG["h200"])
    with pytest.raises(UserError, match=r"--gpus 1009: .*Nearest numbers of GPUs with a legal grid: \d+, \d+"):
        search(planner, 1009, BF16)


def test_memory_is_a_sum(planner: Planner) -> None:
    """State by hand: 2 + 4 bytes on every rank, 12 + 4 over 16 ranks with the same weights."""
    case = planner.case(grid(4, 1, 1, 16))
    parts = peak(case).parts
    numbers = case.parts.stage(28, True, True).learning
    assert parts["weights"] + parts["gradients"] == 6 * numbers
    assert parts["optimizer"] + parts["ema"] == numbers
    assert checkpoint_bytes(case) == pytest.approx(16 * 14_575_018_464, rel=1e-3)


def test_slowest_stage_has_the_images(planner: Planner) -> None:
    first = stage_phases(planner.case(grid(1, 4, 1, 16)), Calibration(), 0, {})
    assert first["vit"] > 0 and first["word head"] == 0


# Hardware and measurements


def test_a_file_describes_a_gpu() -> None:
    gpu = find_gpu(str(EXAMPLES / "hardware" / "cloud_h100.yaml"))
    assert (gpu.network_gb_s, gpu.bf16_tflops, gpu.name) == (12.5, 989, "h100 in a rented server")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("bse: h100", "base = None: expected one of a100"),
        ("base: h100\nmemory: 3", "unknown key 'memory'; did you mean memory_gib?"),
        ("base: h100\nmemory_gib: -3", "memory_gib = -3: expected a number above 0"),
        ("base: h100\ngpus_per_node: 2.5", "gpus_per_node = 2.5: expected a whole number"),
        ("base: h100\nname: 3", "name = 3: expected a name"),
        ("[", "cannot be read"),
        ("- h100", "expected a mapping"),
    ],
)
def test_a_malformed_file(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "custom.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        find_gpu(str(tmp_path / "custom.yaml"))
    assert says in str(error.value) and "custom.yaml" in str(error.value)


def test_unknown_gpus() -> None:
    with pytest.raises(UserError, match="nearest: h100"):
        find_gpu("h10")
    with pytest.raises(UserError, match="cannot be read"):
        find_gpu("absent.yaml")


def bench_file(folder: Path, config: Config, seconds: float, **changes: Any) -> Path:
    """What `megabagel bench` writes, as far as the planner reads it."""
    entry = {"config": to_dict(config), "device": "NVIDIA H200", "world": 8, "steps": [seconds, 9 * seconds, seconds]}
    entry["config"]["model"]["vae"]["path"] = "elsewhere/ae.safetensors"
    file = folder / "bench.json"
    file.write_text(json.dumps({"format": 1, "measurements": [entry | changes]}))
    return file


def test_measurements_correct_the_plan(tmp_path: Path, planner: Planner) -> None:
    chosen = grid(4, 1, 1, 2)
    seconds = 1.5 * planner.estimate(chosen).time.seconds
    (run,) = read_measurements(bench_file(tmp_path, planner.config, seconds), planner.config, "h200")
    assert run.grid == chosen
    constants = corrected(Calibration(), [run.seconds / planner.estimate(run.grid).time.seconds], "bench.json")
    again = Planner(planner.config, planner.gpu, constants)
    assert again.estimate(chosen).time.seconds == pytest.approx(seconds)


def test_a_short_step_corrects_the_plan_of_a_long_one(tmp_path: Path, planner: Planner) -> None:
    """Four packs per step measured, 384 planned: what is half as fast there is half as fast here."""
    few = replace(planner.config, train=replace(planner.config.train, packs_per_step=4))
    seconds = 2 * Planner(few, planner.gpu).estimate(grid(4, 1, 1, 2)).time.seconds
    file = bench_file(tmp_path, few, seconds)
    assert read_measurements(file, planner.config, "h200")[0].config.train.packs_per_step == 4
    words = ("plan", str(PT), "--gpus", "64", "--gpu", "h200", "--explain", "tp=4", "--calibration", str(file))
    code, out, err = command(*words)
    assert code == 0, err
    assert "corrected by 2.00 after measurements" in out


def test_measurements_are_of_the_same_thing(tmp_path: Path) -> None:
    config = recipe()
    with pytest.raises(UserError, match="measured on 'NVIDIA A100', but --gpu is h200"):
        read_measurements(bench_file(tmp_path, config, 1.0, device="NVIDIA A100"), config, "h200")
    other = replace(config, model=replace(config.model, layers=27))
    with pytest.raises(UserError, match=r"measured with model\.layers = 27, the config has 28"):
        read_measurements(bench_file(tmp_path, other, 1.0), config, "h200")
    sources = (replace(config.data.sources[0], weight=100.0), *config.data.sources[1:])
    for other, key in (
        (replace(config, data=replace(config.data, sources=sources)), r"data\.sources \(share by task\)"),
        (replace(config, train=replace(config.train, freeze=("vit",))), r"train\.freeze"),
        (replace(config, parallel=replace(config.parallel, kernels="torch")), r"parallel\.kernels"),
    ):
        with pytest.raises(UserError, match=f"measured with {key} = "):
            read_measurements(bench_file(tmp_path, other, 1.0), config, "h200")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"measurements": [{}]}', '{"measurements": [3]}'])
def test_malformed_measurements(tmp_path: Path, content: str) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(UserError, match="not a result of `megabagel bench`"):
        read_measurements(tmp_path / "bench.json", recipe(), "h200")


def test_no_measurements(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text('{"measurements": []}')
    with pytest.raises(UserError, match="holds no measurement"):
        read_measurements(tmp_path / "bench.json", recipe(), "h200")


# The command


def command(*words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words)
    return code, out.getvalue(), err.getvalue()


def test_plan_says_which_grid_and_why() -> None:
    code, out, _ = command("plan", str(PT), "--gpus", "64", "--gpu", "h200")
    assert code == 0
    assert "legal grids fit" in out and "why the first:" in out and "to run it: parallel.tp=" in out and "MWh" in out


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (("parallel.pp=2", "parallel.vpp=2"), grid(1, 1, 1, 2, recompute="none")),
        (("parallel.pp=2", "parallel.layer_split=[3,1]"), grid(2, 1, 1, 1)),
        (("parallel.pp=2", "parallel.layer_split=[3,1]"), grid(1, 2, 1, 1)),
        (("train.precision=fp32",), grid(1, 2, 1, 1, vpp=2)),
    ],
)
def test_the_words_to_run_it_run_what_was_judged(words: tuple[str, ...], chosen: Grid) -> None:
    """Typed after the same config and settings."""
    config = load(TINY, words)
    again = load(TINY, [*words, *chosen.overrides(config).split()])
    assert again == chosen.apply(config)


def test_plan_prints_words_that_undo_the_configs_grid() -> None:
    code, out, _ = command("plan", str(TINY), "parallel.pp=2", "parallel.vpp=2", "--gpus", "2", "--gpu", "h100")
    assert code == 0
    assert "to run it: parallel.tp=1 parallel.pp=1 parallel.vpp=1 parallel.cp=1 parallel.recompute=none\n" in out


def test_cached_latents_need_not_be_here_and_leave_the_codec_idle() -> None:
    words = (str(TINY), "--gpus", "2", "--gpu", "h100", "--explain", "tp=1")
    with_codec, without = command("plan", *words), command("plan", *words, "data.latents=no/such")
    assert with_codec[0] == without[0] == 0, without[2]
    assert "encoding images" in with_codec[1] and "encoding images" not in without[1]
    code, _, err = command("plan", *words, "data.latents=no/such", "train.steps=-1")
    assert code == 2 and "train.steps" in err and "data.latents" not in err


def test_cached_latents_that_are_here(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    config = load(TINY, [f"data.latents={tmp_path}"])
    load_here, cached = (Planner(c, CATALOG["h100"]).workload.load(1, 1) for c in (load(TINY), config))
    assert load_here.vae_flops > 0 and load_here.largest_image > 0
    assert cached == replace(load_here, vae_flops=0.0, largest_image=0.0)


def test_explain_breaks_one_grid_down() -> None:
    code, out, _ = command("plan", str(PT), "--gpus", "64", "--gpu", "h200", "--explain", "tp=4,pp=1,recompute=none")
    assert code == 0
    for word in ("gradients", "activations", "tensor parallel", "recompute none", "total"):
        assert word in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--gpus", "64", "--gpu", "h200", "--explain", "tp=3"), "parallel.tp = 3"),
        (("--gpus", "64", "--gpu", "h200", "--explain", "tq=3"), "'tq=3' is not understood"),
        (("--gpus", "2", "--gpu", "h200", "--explain", "tp=4"), "one replica takes 4 GPUs"),
        (("--gpus", "1", "--gpu", "h100"), "none of 3 legal grids fits into 93% of 79.6 GiB"),
        (("--gpus", "8", "--gpu", "h101"), "unknown GPU; nearest: h100"),
    ],
)
def test_mistakes_are_one_message(words: tuple[str, ...], says: str) -> None:
    code, _, err = command("plan", str(PT), *words)
    assert code == 2 and says in err and err.count("megabagel: error:") == 1


def test_larger_images_take_longer() -> None:
    """Continued training has twice the resolution and longer packs."""
    config = replace(recipe(), data=replace(recipe().data, max_tokens=46080, min_tokens=40960))
    short, long = (Planner(c, CATALOG["h200"]).estimate(grid(4, 1, 1, 16)) for c in (recipe(), config))
    assert long.time.seconds > 1.2 * short.time.seconds and long.memory.total > short.memory.total + GIB
