"""What a clumsy user meets: one message that names what was found, what was expected and the next step, exit code 2 on
every rank, no traceback, no hang; or, for single samples, a count and a run that goes on.

Nearly all jobs are the real command line inside the pool's warm workers: importing megatron-core takes seconds.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from megabagel.errors import TransientFailure, UserError
from megabagel.sequence.items import SPECIAL_TOKENS
from tests.support.cli_harness import command, fill, job, metrics, once_training, pairs, small_disk, tiny_run
from tests.support.pictures import BAD, ODD
from tests.support.rank_pool import RankPool

both = pytest.mark.parametrize("size", [1, 2])
FOREVER = "train.steps=100000"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny run; tests set another run.dir."""
    return tiny_run(tmp_path_factory.mktemp("tiny"), pairs(6))


@pytest.fixture(scope="module")
def finished(ranks: RankPool, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps with its checkpoint, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    job(ranks, 2, tiny, f"run.dir={folder}").succeeded()
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of the tiny run (2 MB) and a half."""
    with small_disk(tmp_path / "disk", 5000) as mounted:
        if not mounted:
            pytest.skip("this user may not mount a file system")
        yield tmp_path / "disk"


# The config


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["No such file", "expected a YAML file"]),
        ("/", ["Is a directory", "expected a YAML file"]),
        (b"\xff\xfe", ["byte 0 is not UTF-8", "expected a YAML file"]),
        (b"train: [1, 2", ["line 1, column 13", "expected ',' or ']'"]),
        (b"hello", ["'hello'", "expected a mapping with sections run, model"]),
        (
            b"model: {hiden: 3}\ntrain: {setps: 4}",
            ["3 problems", "model.hiden = 3", "did you mean model.hidden?", "train.setps = 4", "train.steps"],
        ),
        (
            b"model: {layers: four}\ntrain: {lr: [1]}\ndata: 3",
            ["model.layers = 'four': expected an integer", "train.lr = [1]: expected a number", "data = 3: expected a"],
        ),
    ],
)
def test_config(tmp_path: Path, content: bytes | str | None, parts: list[str]) -> None:
    path = tmp_path if content == "/" else tmp_path / "my.yaml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    command("train", path, "--nproc", 2).refused(path, *parts)


# Ranks


def test_ranks_that_the_grid_does_not_divide(ranks: RankPool, tiny: Path) -> None:
    parts = ["world size = 3, parallel.tp = 2", "takes tp x pp x cp = 2 ranks", "Start 2 or 4 ranks"]
    command("train", tiny, "parallel.tp=2", "--nproc", 3).refused(*parts)
    job(ranks, 1, tiny, "parallel.tp=2", RANK="2", WORLD_SIZE="3").refused(*parts)
    job(ranks, 2, tiny, "parallel.pp=4", "model.layers=4").refused("world size = 2", "Start 4 ranks")
    job(ranks, 2, tiny, "train.packs_per_step=3").refused("train.packs_per_step = 3", "Set train.packs_per_step to 2")


@pytest.mark.parametrize(
    ("place", "parts"),
    [
        ({"MASTER_ADDR": ""}, ["MASTER_ADDR is not set for a job of several ranks", "torchrun or --nproc"]),
        ({"MASTER_PORT": "http"}, ["MASTER_PORT=http", "expected a port", "free on 127.0.0.1"]),
        ({"WORLD_SIZE": "", "RANK": "1"}, ["RANK=1, but WORLD_SIZE is not set", "set all of RANK, WORLD_SIZE"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE=two", "expected whole numbers"]),
        ({"RANK": "2"}, ["RANK=2, WORLD_SIZE=2", "expected both ranks below the world size"]),
    ],
    ids=str,
)
def test_places(ranks: RankPool, tiny: Path, place: dict[str, str], parts: list[str]) -> None:
    job(ranks, 2, tiny, **place).refused(*parts)


# Shards


@both
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("none-*.tar", None, ["path 'none-*.tar'", "no file matches", "megabagel data prepare"]),
        ("text.tar", b"not a tar", ["text.tar: cannot be read as a shard", "Expected an uncompressed tar"]),
        ("zero.tar", b"", ["zero.tar: cannot be read as a shard (empty file)", "Expected an uncompressed tar"]),
    ],
)
def test_shards(
    ranks: RankPool, tiny: Path, tmp_path: Path, size: int, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    job(ranks, size, tiny, f"run.dir={tmp_path}/run", f"data.root={tmp_path}", f"data.sources.0.path={name}").refused(
        tmp_path, *parts
    )


def test_a_truncated_shard_loses_its_end_only(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, pairs(6))
    shard = tmp_path / "data" / "pairs-000000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    outcome = job(ranks, 2, config).succeeded()
    assert "samples: 3, skipped: 1" in outcome.errors[0]
    assert f"{shard.name}: 0003: damaged shard" in outcome.errors[0]
    os.truncate(shard, 1024)
    job(ranks, 2, config).refused(shard, "no sample is usable", "1 x damaged shard", "mend the shards")


@both
def test_a_shard_that_is_cut_while_it_is_in_use(ranks: RankPool, tmp_path: Path, size: int) -> None:
    config = tiny_run(tmp_path, pairs(6))
    shard = tmp_path / "data" / "pairs-000000.tar"
    with once_training(tmp_path / "run", lambda: os.truncate(shard, 1024)):
        outcome = job(ranks, size, config, FOREVER)
    outcome.refused(shard, "bytes at offset", "The shard changed while it was in use; start again")


def test_shards_that_vanish_while_they_are_in_use(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, pairs(60), per_shard=1)
    job(ranks, 1, config, "train.steps=1").succeeded()  # leaves the index's cache, so that no shard is open at start
    shutil.rmtree(tmp_path / "run")
    with once_training(tmp_path / "run", lambda: [path.unlink() for path in (tmp_path / "data").glob("*.tar")]):
        outcome = job(ranks, 2, config, FOREVER)
    outcome.refused(tmp_path / "data", "cannot be read", "No such file", "Bring the shard back or remove it")


def steps_in_step() -> tuple[list[int], str]:
    """Steps that this rank sees when rank 1 has only two of three, and the message that it ends with."""
    import torch.distributed as dist

    from megabagel.data.load.loader import Step
    from megabagel.train.run import in_step

    def steps() -> Iterator[Step]:
        for number in (1, 2, 3):
            if number == 3 and dist.get_rank() == 1:
                raise UserError("shard gone")
            yield Step(number, [], frozenset())  # type: ignore[arg-type]

    seen: list[int] = []
    with pytest.raises(UserError) as caught:
        seen.extend(step.plan for step in in_step(steps()))  # type: ignore[misc]
    return seen, str(caught.value)


def test_a_rank_without_its_share_ends_all(ranks: RankPool) -> None:
    assert ranks.run(2, steps_in_step) == [([1, 2], "rank 1: shard gone")] * 2


# Samples


def test_bad_samples_are_counted_and_named_once(ranks: RankPool, tmp_path: Path) -> None:
    bad = [(name.replace(".", "-"), {name.split(".")[1]: file, "txt": b"bad"}) for name, (file, _) in BAD.items()]
    cmyk = [("cmyk", {"jpg": ODD["cmyk.jpg"][0], "txt": b"four inks"})]
    long = [("long", {"png": ODD["plain.png"][0], "txt": b"a" * 500})]
    config = tiny_run(tmp_path, [*pairs(2), *bad, *cmyk, *long])
    outcome = job(ranks, 2, config, "train.steps=4").succeeded()
    log = outcome.errors[0]
    assert f"samples: 4, skipped: {len(bad)}" in log
    assert "1 x zero bytes" in log
    assert "zero-jpg: zero bytes (jpg)" in log
    assert "half-jpg: damaged image (jpg: image file is truncated" in log
    assert "source pairs: sample long has 506 tokens, limit 64: left out (longer than the window)" in log
    assert log.count("left out") == 1
    assert outcome.errors[1] == "", "rank 0 speaks for all"
    assert metrics(tmp_path / "run")[-1]["skipped"] >= 1


def spoil(shard: Path) -> None:
    """Zeros in place: the file never gets shorter, as it would for a moment by `write_bytes`."""
    with shard.open("r+b") as file:
        file.write(bytes(shard.stat().st_size))


def test_images_that_go_bad_in_use_are_lost_and_counted(ranks: RankPool, tmp_path: Path) -> None:
    config = tiny_run(tmp_path, pairs(6))
    shard = tmp_path / "data" / "pairs-000000.tar"
    with once_training(tmp_path / "run", lambda: spoil(shard)):
        outcome = job(ranks, 2, config, "train.steps=40").succeeded()
    for text in outcome.errors:
        assert "source pairs, sample 000" in text
        assert "image lost: changed since it was indexed" in text
    assert [record["lost_images"] > 0 for record in metrics(tmp_path / "run")][::39] == [False, True]


@both
def test_a_source_of_which_nothing_fits(ranks: RankPool, tiny: Path, tmp_path: Path, size: int) -> None:
    words = ["data.min_tokens=10", "data.max_tokens=16", f"run.dir={tmp_path}"]
    job(ranks, size, tiny, *words).refused("none of the 6 samples of pairs fits into 16 tokens", "raise the limit")


# Tokenizer, codec, prompts


def vocabulary(*tokens: str) -> bytes:
    return Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, tokens[0])).to_str().encode()


@both
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("tokenizer.json", None, ["no such file", "Expected `bytes`, a `tokenizer.json`"]),
        ("tokenizer.json", b"{", ["is not a readable tokenizer", "Copy or train the file again"]),
        ("words.model", b"xx", ["is not a readable tokenizer", "Copy or train the file again"]),
        ("tokenizer.json", vocabulary("a"), ["lacks <|im_start|>, <|im_end|>", "add them"]),
        (
            "tokenizer.json",
            vocabulary(*SPECIAL_TOKENS, *map(str, range(300))),
            ["model.vocab=264", "has 304 tokens", "set model.vocab to at least that"],
        ),
    ],
    ids=["missing", "corrupt", "corrupt-sentencepiece", "without special tokens", "too many ids"],
)
def test_tokenizers(
    ranks: RankPool, tiny: Path, tmp_path: Path, size: int, name: str, content: bytes | None, parts: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    job(ranks, size, tiny, f"data.tokenizer={tmp_path / name}", f"run.dir={tmp_path}/run").refused(
        tmp_path / name, *parts
    )


def test_codecs(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    weights = tmp_path / "ae.safetensors"
    words = [tiny, "model.vae.codec=flux", f"model.vae.path={weights}", f"run.dir={tmp_path}/run"]
    command("train", *words, "--nproc", 2).refused(f"model.vae.path = '{weights}'", "Set model.vae.path to an existing")
    weights.write_bytes(b"garbage")
    job(ranks, 2, *words).refused(f"model.vae.path={weights} cannot be read", "expected a complete ae.safetensors")


def test_a_sample_whose_image_is_missing(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    words = ["telemetry.sample_every=1", "telemetry.edits=[{image: none.png, text: make it blue}]"]
    job(ranks, 2, tiny, *words, "telemetry.sample_size=[32, 32]", f"run.dir={tmp_path}").refused(
        "telemetry.edits: none.png: cannot be read (No such file or directory); expected an image file"
    )


# Checkpoints


def overwrite(path: Path) -> None:
    """Change bytes in the middle, not the size."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 5000] = bytes(byte ^ 0xFF for byte in content[middle : middle + 5000])
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("manifest.json", lambda path: os.truncate(path, 100), ["manifest.json: cannot be read"]),
        ("manifest.json", lambda path: path.write_text("[]"), ["no manifest of a checkpoint"]),
        ("state.json", lambda path: path.write_text("{".ljust(path.stat().st_size)), ["state.json: was changed"]),
        ("state.json", lambda path: path.write_text("{}"), ["state.json: 2 bytes, expected", "by manifest.json"]),
        ("rank_00000.safetensors", os.unlink, ["rank_00000.safetensors: missing, expected", "by manifest.json"]),
        ("rank_00000.safetensors", lambda path: os.truncate(path, 1000), ["rank_00000.safetensors: 1000 bytes, exp"]),
        ("rank_00000.safetensors", overwrite, ["rank_00000.safetensors: was changed: its checksum is not that of"]),
        ("common.pt", lambda path: path.write_bytes(b""), ["common.pt: a pickle, which can run any code"]),
    ],
)
def test_damaged_checkpoints(
    ranks: RankPool,
    tiny: Path,
    finished: Path,
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], object],
    parts: list[str],
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    damage(checkpoint / name)
    words = ["train.steps=3", f"run.dir={tmp_path}/run"]
    job(ranks, 2, tiny, *words).refused(checkpoint, *parts, "run.resume")


@both
def test_checkpoints_of_another_run(ranks: RankPool, tiny: Path, finished: Path, tmp_path: Path, size: int) -> None:
    shutil.copytree(finished, tmp_path / "run")
    words = ["train.steps=3", f"run.dir={tmp_path}/run"]
    job(ranks, size, tiny, *words, "model.hidden=64").refused(
        "model.hidden=64", finished.name, "was trained with 32", "run.resume=none"
    )
    job(ranks, size, tiny, *words, "model.vit.ffn=64").refused("model.vit.ffn=64", "was trained with 32")
    other = tiny_run(tmp_path / "other", pairs(7)[1:])
    job(ranks, size, other, *words).refused("data.sources: pairs changed since the checkpoint", "Restore the shards")


def test_averages_that_a_checkpoint_lacks(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    words = [tiny, f"run.dir={tmp_path}/run"]
    job(ranks, 1, *words, "train.steps=1", "train.ema=0").succeeded()
    job(ranks, 2, *words).refused("train.ema=0.9999", tmp_path / "run", "holds no averaged weights", "set train.ema=0")


def test_checkpoints_that_are_not_there(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    command("train", tiny, "run.resume=/nowhere", "--nproc", 2).refused("run.resume = '/nowhere'", "no such folder")
    job(ranks, 2, tiny, f"run.resume={tmp_path}", f"run.dir={tmp_path}/run").refused(
        f"run.resume={tmp_path}", "no complete checkpoint there (expected manifest.json", "or use run.resume=auto"
    )


# Disks


@both
def test_a_file_in_the_way(ranks: RankPool, tiny: Path, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_text("")
    job(ranks, size, tiny, f"run.dir={tmp_path}/file").refused(f"run.dir={tmp_path}/file", "choose a folder")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    job(ranks, size, tiny, f"run.dir={tmp_path}/run").refused(
        tmp_path / "run" / "metrics.jsonl", "Is a directory", "set run.dir to another folder"
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoints").write_text("")
    job(ranks, size, tiny, f"run.dir={tmp_path}/other").refused(f"run.dir={tmp_path}/other", "File exists")


def test_a_disk_that_cannot_be_written_at_start(ranks: RankPool, tiny: Path, disk: Path) -> None:
    fill(disk)
    job(ranks, 2, tiny, f"run.dir={disk}/run").refused(
        disk / "run", "No space left on device", "another run.dir", code=TransientFailure.code
    )
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    job(ranks, 2, tiny, f"run.dir={disk}/new").refused(
        f"run.dir={disk}/new", "Read-only file system", "choose a folder"
    )


@both
def test_a_disk_that_is_full_in_a_step(ranks: RankPool, tiny: Path, disk: Path, size: int) -> None:
    with once_training(disk / "run", lambda: fill(disk)):
        outcome = job(ranks, size, tiny, f"run.dir={disk}/run", FOREVER)
    outcome.refused(
        disk / "run" / "metrics.jsonl",
        "No space left on device",
        "Free space",
        "start again",
        code=TransientFailure.code,
    )


def test_a_disk_that_is_full_at_a_checkpoint(ranks: RankPool, tiny: Path, disk: Path) -> None:
    words = [tiny, f"run.dir={disk}/run"]
    checkpoints = disk / "run" / "checkpoints"
    job(ranks, 2, *words, "train.steps=1").succeeded()
    filler = fill(disk, leave=300)
    job(ranks, 2, *words).refused(
        checkpoints, "KiB are free", "The previous checkpoint is untouched", "start again", code=TransientFailure.code
    )
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001"]
    filler.unlink()
    outcome = job(ranks, 2, *words).succeeded()
    assert f"resumed from {checkpoints}/step_00000001 at step 1" in outcome.errors[0]
    assert [record["step"] for record in metrics(disk / "run")] == [1, 2]


def test_writers_that_fail(ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    """Room is promised, but the system refuses: the writers fail on both ranks."""
    words = [tiny, f"run.dir={tmp_path}/run"]
    checkpoints = tmp_path / "run" / "checkpoints"
    job(ranks, 2, *words, "train.steps=1").succeeded()
    outcome = job(ranks, 2, *words, file_limit=100_000)
    outcome.refused(checkpoints / ".step_00000002.partial", "cannot be written", "start again")
    assert "File too large" in outcome.errors[0]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000001"]
    job(ranks, 2, *words).succeeded()


@pytest.mark.slow
def test_the_whole_command_on_a_full_disk(tiny: Path, disk: Path) -> None:
    """As a user starts it; the ranks import everything themselves."""
    fill(disk, leave=500)
    words = ["train", tiny, f"run.dir={disk}/run", "--nproc", 2]
    command(*words).refused(disk / "run" / "checkpoints", "KiB are free", "make room", code=TransientFailure.code)
