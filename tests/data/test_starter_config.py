"""`megabagel init`: the config that it writes loads, fits the data, and trains."""

from pathlib import Path

import pytest

from megabagel.cli import main
from megabagel.config.load import load
from megabagel.data.builders.prepare import prepare
from megabagel.data.plan.global_plan import GlobalPlan, open_sources
from megabagel.data.starter_config import MOST_TOKENS, starter_config
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from tests.support.pictures import file_of, noise


def pictures(root: Path, height: int, width: int, count: int = 6) -> Path:
    """A folder of shards with captioned noise."""
    (root / "in").mkdir(parents=True)
    for number in range(count):
        (root / "in" / f"{number}.png").write_bytes(file_of(noise(width, height)))
        (root / "in" / f"{number}.txt").write_text(f"page {number}")
    prepare(root / "in", root / "shards", samples_per_shard=4, name="some-pages")
    return root / "shards"


def plan_of(path: Path) -> GlobalPlan:
    config = load(path)
    return GlobalPlan(open_sources(config, load_tokenizer(config.data.tokenizer)), config)


def test_sources_and_tasks_of_the_shapes(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    assert main(["init", str(shapes), "--out", str(out), "--tokenizer", str(shapes / "tokenizer.json")]) == 0
    told = capsys.readouterr()
    assert "scenes_t2i: t2i, 60 samples" in told.out and f"wrote {out}" in told.out
    assert told.err == "", "tasks that are only tried make no noise"
    config = load(out)
    assert [(source.name, source.path, source.task) for source in config.data.sources] == [
        ("clips", "clips-[0-9]*.tar", "video"),
        ("edits", "edits-[0-9]*.tar", "edit"),
        ("notes", "notes-[0-9]*.tar", "text"),
        ("scenes_t2i", "scenes-[0-9]*.tar", "t2i"),
        ("scenes_i2t", "scenes-[0-9]*.tar", "i2t"),
    ]
    # Pages are 48 x 48, 48 x 36 or 60 x 48 pixels.
    assert (config.data.vae_resize.max_size, config.data.vae_resize.min_size) == (64, 32)
    assert (config.data.vit_resize.max_size, config.data.vit_resize.min_size) == (70, 28)
    plan = plan_of(out)
    for _ in range(20):
        step = plan.next_step()
    assert not step.skipped, "no sample is longer than a pack"
    assert all(pack.size.tokens >= config.data.min_tokens for pack in step.packs)


def test_the_config_trains(tmp_path: Path) -> None:
    shards = pictures(tmp_path, 40, 56)
    out = tmp_path / "mine.yaml"
    starter_config(shards, out, tokenizer=None, weights=None)
    options = ["train.steps=2", f"run.dir={tmp_path / 'run'}", "model.layers=1", "telemetry.tensorboard=false"]
    assert main(["train", str(out), *options]) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_large_pictures_are_bounded(tmp_path: Path) -> None:
    out = tmp_path / "mine.yaml"
    starter_config(pictures(tmp_path, 300, 700, 2), out, tokenizer=None, weights=None)
    config = load(out)
    assert (config.data.vae_resize.max_size, config.data.vae_resize.min_size) == (256, 256)
    assert (config.model.latent_grid, config.model.vit.grid) == (16, 18)
    assert config.data.max_tokens <= MOST_TOKENS
    assert plan_of(out).next_step().size.samples


def test_published_weights_bring_model_and_tokenizer(tmp_path: Path) -> None:
    weights = tmp_path / "bagel"
    (weights / "official").mkdir(parents=True)
    (weights / "model.yaml").write_text("model: {layers: 2, hidden: 64, vocab: 768, latent_grid: 32, vit: {grid: 40}}")
    (weights / "manifest.json").write_text("{}")
    out = tmp_path / "mine.yaml"
    starter_config(pictures(tmp_path, 300, 700, 2), out, tokenizer=None, weights=weights)
    config = load(out)
    assert (config.model.hidden, config.run.init_from) == (64, str(weights))
    assert config.data.vae_resize.max_size == 512 and config.train.precision == "bf16"


def test_names_with_spaces_and_quotes(tmp_path: Path) -> None:
    root = tmp_path / "it's: #1"
    root.mkdir()
    shards = pictures(root, 40, 56)
    moved = shards.rename(root / "a 'b' {c}")
    out = tmp_path / "mine.yaml"
    starter_config(moved, out, tokenizer=None, weights=None)
    config = load(out)
    assert config.data.root == str(moved) and plan_of(out).next_step().size.samples


def test_users_mistakes(tmp_path: Path) -> None:
    shards = pictures(tmp_path, 40, 56)
    out = tmp_path / "mine.yaml"
    for folder, message in (("gone", "no such folder"), ("in", "data prepare")):
        with pytest.raises(UserError, match=message):
            starter_config(tmp_path / folder, out, tokenizer=None, weights=None)
    with pytest.raises(UserError, match=r"no model\.yaml in it"):
        starter_config(shards, out, tokenizer=None, weights=tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"label": 3}\n')
    with pytest.raises(UserError, match="unknown layout"):
        starter_config(tmp_path / "bad", out, tokenizer=None, weights=None)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        starter_config(shards, out, tokenizer=None, weights=None)
    assert out.read_text() == "mine"
