"""What the README and the example configs say runs: every command, with a few steps of the smallest run."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from megabagel.config.load import load
from tests.checkpoint.hf.test_parts import Parts
from tests.support.parity_files import stem

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "architecture.md",
    ROOT / "docs" / "bagel.md",
    ROOT / "docs" / "notation.md",
    ROOT / "docs" / "parity.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "checkpoints.md",
    ROOT / "docs" / "faults.md",
    ROOT / "docs" / "planner.md",
    ROOT / "docs" / "cluster.md",
)
COMMANDS = sorted({
    line.split("  #")[0].strip()
    for document in DOCUMENTS
    for line in document.read_text().splitlines()
    if re.match(r"    (megabagel|torchrun|srun|make|python) ", line) and "# cluster" not in line  # needs GPUs
})  # fmt: skip
TRAIN = [command for command in COMMANDS if re.search("megabagel train(?!.*(init_from|data.latents))", command)]
OFFICIAL = ("import-hf BAGEL", "import-hf --llm", "train CONFIG run.init_from", "export-hf", "parity")
"""Commands about the official model, in the order in which they can be run."""
WORK = ("data index", "data stats", "data inspect", "doctor", "plan", "dryrun", "bench", "checkpoint", "reshard")
"""Commands that need nothing but a config, or the checkpoint of a run."""
WORKING = [c for c in COMMANDS if re.match(f"megabagel ({'|'.join(WORK)})", c) and "bench compare" not in c]
"""The comparison of two reports is in tests/slurm."""
LATENTS = ("data latents", "train CONFIG data.latents")
RECIPE = "bagel_7b_pt.yaml"
"""What is planned and rehearsed."""
SHORT = "train.steps=2 train.warmup=1 telemetry.sample_every=0 checkpoint.every=0"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_example_configs_are_valid(config: Path) -> None:
    assert load(config, ["model.vae.codec=blocks"]).data.sources  # recipes name weights that a user brings


def test_what_is_named_exists() -> None:
    named = {path for document in DOCUMENTS for path in re.findall(r"\]\(([\w./-]+)\)", document.read_text())}
    assert {"examples/configs/demo.yaml", "docs/images/demo.png"} <= named
    for document in DOCUMENTS:
        for path in re.findall(r"\]\(([\w./-]+)\)", document.read_text()):
            assert (document.parent / path).exists(), f"{document.name} names {path}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert {"demo", "test"} <= used <= targets


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "slurm").glob("*.sbatch")), ids=lambda path: path.name)
def test_every_srun_is_given_the_jobs_processors(script: Path) -> None:
    """Since Slurm 22.05 it does not take sbatch's --cpus-per-task over; without any it gets no such option."""
    lines = script.read_text().splitlines()
    (made,) = (line for line in lines if line.startswith("srun=("))
    sruns = [line for line in lines if re.match(r' *(srun|"\$\{srun\[@\]\}") ', line)]
    assert sruns and all(line.lstrip().startswith('"${srun[@]}" ') for line in sruns)
    for given, wanted in (({"SLURM_CPUS_PER_TASK": "12"}, "srun --cpus-per-task=12 true"), ({}, "srun true")):
        told = ["bash", "-uc", made + '\necho "${srun[@]}" true']
        assert subprocess.run(told, env=given, capture_output=True, text=True).stdout.strip() == wanted


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def _runnable(command: str, data: Path, run: Path) -> tuple[list[str], dict[str, str]]:
    """The command as it stands, on the smallest run, by this interpreter; srun is played by its variables."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = shlex.split(command)
    if words[0] == "torchrun":
        words[:1] = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(_free_port())]
    elif words[0] == "srun":
        ranks = words[words.index("--ntasks") + 1]
        words = ["bash", "-c", _as_srun(words[words.index("megabagel") :], int(ranks))]
    else:
        words[:1] = [sys.executable, "-m", "megabagel"]
    options = [f"data.root={data}", f"run.dir={run}", *SHORT.split()]
    text = "\0".join(words).replace("CONFIG", str(ROOT / "examples" / "configs" / "tiny.yaml"))
    words = text.split("\0")
    if words[0] == "bash":
        words[-1] = words[-1].replace("OPTIONS", shlex.join(options))
        return words, env
    return [*words, *options], env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _as_srun(words: list[str], ranks: int) -> str:
    """A shell line that starts every rank with what srun would tell it."""
    train = shlex.join([sys.executable, "-m", "megabagel", *words[1:]])
    one = f"SLURM_PROCID=$r SLURM_STEP_NUM_TASKS={ranks} SLURM_LOCALID=$r SLURM_NTASKS_PER_NODE={ranks} {train} OPTIONS"
    return (
        f"export MASTER_ADDR=127.0.0.1 MASTER_PORT={_free_port()}; pids=''; "
        f'for r in $(seq 0 {ranks - 1}); do {one} & pids="$pids $!"; done; for p in $pids; do wait $p || exit 1; done'
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", TRAIN)
def test_training_commands_run(command: str, data_root: Path, tmp_path: Path) -> None:
    words, env = _runnable(command, data_root, tmp_path / "run")
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().strip() == "step_00000002"


@pytest.mark.thorough
def test_commands_about_the_official_model_run(data_root: Path, tmp_path: Path) -> None:
    """One after the other in one folder. A tiny run, exported, plays the published checkpoint."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    config, first = ROOT / "examples" / "configs" / "tiny.yaml", tmp_path / "RUN" / "checkpoints" / "step_00000002"
    options = [f"data.root={data_root}", *SHORT.split()]

    def run(*words: object) -> None:
        command = [sys.executable, "-m", "megabagel", *map(str, words)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    run("train", config, f"run.dir={tmp_path / 'RUN'}", *options)
    run("export-hf", first, "BAGEL-7B-MoT")
    Parts(tmp_path).write("Qwen2.5-7B", "siglip2", "ae.safetensors")
    ran, case = [], str(stem("train_01_text_only"))
    for wanted in OFFICIAL:
        for command in (command for command in COMMANDS if wanted in command):
            words = [word.replace("step_00000100", first.name) for word in shlex.split(command)[1:]]
            if "--llm" in words:
                words[-1] = "from-parts"
            if wanted == "export-hf":
                words = [f"{word}-{len(ran)}" if word == "OUT" else word for word in words]
            words = [{"CONFIG": str(config), "CASE": case}.get(word, word) for word in words]
            words = [str(ROOT / word) if word.startswith("tests/") else word for word in words]
            run(*words, *(["run.dir=next", *options] if words[0] == "train" else ()))
            ran.append(wanted)
    assert set(ran) >= set(OFFICIAL)


@pytest.fixture(scope="module")
def finished(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    _run(folder, "train", _config("tiny.yaml"), *_options(data_root), f"run.dir={folder / 'RUN'}")
    return folder


def _config(name: str) -> str:
    return str(ROOT / "examples" / "configs" / name)


def _options(data: Path) -> list[str]:
    return [f"data.root={data}", *SHORT.split()]


def _run(folder: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megabagel", *words]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", WORKING)
def test_working_commands_run(command: str, finished: Path, data_root: Path) -> None:
    words = [word.replace("step_00000100", "step_00000002") for word in shlex.split(command)[1:]]
    at = words.index("CONFIG") if "CONFIG" in words else None
    if at is not None and words[0] in ("plan", "dryrun"):
        words[at] = _config(RECIPE)
    elif at is not None:
        words[at : at + 1] = [_config("tiny.yaml"), *_options(data_root)]
    assert _run(finished, *words)


@pytest.mark.slow
def test_latents_are_cached_and_trained_on(finished: Path, data_root: Path) -> None:
    commands = [command for wanted in LATENTS for command in COMMANDS if wanted in command]
    assert len(commands) == 2
    for command in commands:
        words = [word.replace("OUT", str(finished / "latents")) for word in shlex.split(command)[1:]]
        words[words.index("CONFIG")] = _config("tiny.yaml")
        _run(finished, *words, *_options(data_root), f"run.dir={finished / 'cached'}")
    losses = [
        [json.loads(line)["loss"] for line in (finished / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("RUN", "cached")
    ]
    assert losses[0] == losses[1]


def test_every_command_of_the_documents_is_run_by_a_test() -> None:
    elsewhere = ("make ", "megabagel data prepare", "megabagel init", "python tools/", "python benchmarks/")
    mine = tuple(f"megabagel {word}" for word in (*WORK, *LATENTS))
    for command in COMMANDS:
        official = any(wanted in command for wanted in OFFICIAL)
        assert command in TRAIN or official or command.startswith((*elsewhere, *mine)), command


def test_data_prepare(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30), (40 * number, 0, 0)).save(images / f"{number}.jpg")
        (images / f"{number}.txt").write_text(f"picture {number}")
    command = [sys.executable, "-m", "megabagel", "data", "prepare", str(images), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shards-000000.tar"]
