"""The latent cache against codecs that see the pixels: a small random FLUX autoencoder and the exact blocks."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megabagel.config.schema import Config, SourceConfig, VaeConfig
from megabagel.data.decode.host import HostEngine
from megabagel.data.load import latents
from megabagel.data.load.latents import LatentCache, Report, image_name, open_latents, write_latents
from megabagel.data.load.loader import Loader, Step
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from megabagel.model.noise import normal
from megabagel.model.vae import Codec, build_codec, codec_fingerprint
from megabagel.model.vae_flux import Autoencoder
from megabagel.sequence.batch import PackedBatch
from tests.support.batches import batch_builder
from tests.support.config_tree import change
from tests.support.pictures import file_of, noise
from tests.support.small_run import small_config, sources_of

FLUX = VaeConfig(codec="flux", channels=3, downsample=8, width=32, width_multipliers=(1, 1, 1, 1), res_blocks=1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("flux") / "ae.safetensors")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Autoencoder(FLUX).state_dict().items()}
    save_file({name: 0.1 * normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}, path)
    return path


@pytest.fixture(scope="module", params=["blocks", "flux"])
def config(request: pytest.FixtureRequest, shapes: Path, weights: str) -> Config:
    small = small_config(shapes)
    vae = replace(FLUX, path=weights) if request.param == "flux" else small.model.vae
    return replace(small, model=replace(small.model, vae=vae))


def write(config: Config, folder: Path, precision: Any = "fp32") -> Report:
    codec = build_codec(config.model.vae)
    known = (codec_fingerprint(config.model.vae), codec.moment_channels)
    return write_latents(config, sources_of(config), folder, HostEngine(), codec.moments, known, precision)


def opened(config: Config, folder: Path) -> LatentCache:
    return open_latents(folder, config, sources_of(config), codec_fingerprint(config.model.vae))


def loader(config: Config, cache: LatentCache | None) -> Loader:
    plan, tokenizer = GlobalPlan(sources_of(config), config), load_tokenizer(config.data.tokenizer)
    return Loader(plan, tokenizer, HostEngine(), config, batch_builder(config), latents=cache)


def batches(config: Config, cache: LatentCache | None) -> Iterator[PackedBatch]:
    return (batch for step in loader(config, cache).steps(4) for batch in step.batches)


@pytest.mark.parametrize(("precision", "rounded"), [("fp32", lambda x: x), ("bf16", lambda x: x.bfloat16().float())])
def test_moments_are_those_of_the_pixels(
    config: Config, tmp_path: Path, precision: str, rounded: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    report = write(config, tmp_path, precision)
    assert report.written > 50 and report.lost == 0
    codec: Codec = build_codec(config.model.vae)
    images = 0
    for ours, theirs in zip(batches(config, opened(config, tmp_path)), batches(config, None), strict=True):
        assert ours.pixels == [] and ours.moments is not None and theirs.moments is None
        for moments, pixels in zip(ours.moments, theirs.pixels, strict=True):
            assert moments.dtype == torch.float32
            assert torch.equal(moments, rounded(codec.moments(pixels[None])[0]))
            assert torch.equal(codec.draw(codec.moments(pixels[None]), [7]), codec.encode(pixels[None], [7]))
            images += 1
        assert ours.patches is not None and theirs.patches is not None
        assert torch.equal(ours.patches, theirs.patches)
    assert images > 30


def test_a_second_run_adds_what_is_missing(config: Config, tmp_path: Path) -> None:
    first = change(config, {"data.sources": config.data.sources[:1]})
    part, again, whole = write(first, tmp_path), write(first, tmp_path), write(config, tmp_path)
    assert again == Report(0, part.written + part.known, 0)
    assert whole.written > 0 and whole.known >= part.written
    everything = [*batches(config, opened(config, tmp_path))]
    assert all(tensor.isfinite().all() for batch in everything for tensor in batch.moments or [])


def test_a_shard_that_was_removed_is_written_again_beside_the_others(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the message about a damaged shard advises: the others keep their images."""
    monkeypatch.setattr(latents, "SHARD_BYTES", 1)  # a shard per batch of images
    first = write(config, tmp_path)
    before = opened(config, tmp_path).shards
    names = sorted(set(before.values()))
    assert len(names) >= 3
    (tmp_path / names[0]).unlink()
    again = write(config, tmp_path)
    assert again == Report(sum(shard == names[0] for shard in before.values()), again.known, 0)
    assert again.written + again.known == first.written + first.known
    after = opened(config, tmp_path).shards
    assert after.keys() == before.keys()
    assert all(after[image] == shard for image, shard in before.items() if shard != names[0])


def test_image_files_that_are_gone_or_changed_are_lost_alone(config: Config, tmp_path: Path) -> None:
    lines = []
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(file_of(noise(32, 32 + n)))
        items = [{"type": "text", "text": "a"}, {"type": "image", "name": f"{n}.png"}]
        lines.append(json.dumps({"items": items}))
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    entry = SourceConfig(name="loose", path=str(tmp_path / "a.jsonl"), task="t2i")
    loose = change(config, {"data.sources": (entry,)})
    sources, codec = sources_of(loose), build_codec(loose.model.vae)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"other")
    known = (codec_fingerprint(loose.model.vae), codec.moment_channels)
    report = write_latents(loose, sources, tmp_path / "out", HostEngine(), codec.moments, known, "fp32")
    assert report == Report(2, 0, 2) and str(report).endswith("lost: 2")


def test_what_does_not_fit_is_refused_by_name(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json there; `megabagel data latents CONFIG"):
        opened(config, tmp_path)
    part = change(config, {"data.sources": config.data.sources[:1]})
    write(part, tmp_path)
    opened(part, tmp_path)
    with pytest.raises(UserError, match=r"nothing is known of edit, clips as data\.sources has it now"):
        opened(config, tmp_path)
    with pytest.raises(UserError, match=r"with codec = (blocks|flux):\w+, but other is wanted"):
        open_latents(tmp_path, part, sources_of(part), "other")
    larger = change(part, {"data.vae_resize.max_size": 96})
    with pytest.raises(UserError, match=r"data\.vae_resize = .*'max_size': 64.*'max_size': 96.* is wanted"):
        opened(larger, tmp_path)
    with pytest.raises(UserError, match="with precision = fp32, but bf16 is wanted"):
        write(part, tmp_path, "bf16")


def test_other_weights_are_another_codec(weights: str, tmp_path: Path) -> None:
    other = tmp_path / "ae.safetensors"
    other.write_bytes(Path(weights).read_bytes()[:-1] + b"!")
    names = {codec_fingerprint(replace(FLUX, path=str(path))) for path in (weights, other)}
    assert len(names | {codec_fingerprint(VaeConfig())}) == 3
    with pytest.raises(UserError, match=r"model\.vae\.path=nowhere cannot be read"):
        codec_fingerprint(replace(FLUX, path="nowhere"))


def test_an_image_that_is_not_in_the_cache_is_lost_alone(config: Config, tmp_path: Path) -> None:
    draw = change(config, {"data.sources": config.data.sources[:1]})
    write(draw, tmp_path)
    cache = opened(draw, tmp_path)
    absent = set(sorted(cache.shards)[::3])
    part = replace(cache, shards={name: shard for name, shard in cache.shards.items() if name not in absent})
    lost, found = 0, 0
    for ours, whole in zip(loader(draw, part).steps(4), loader(draw, cache).steps(4), strict=True):
        pairs = zip(_moments(ours), _moments(whole), strict=True)
        nans = [bool(mine.isnan().all()) and mine.shape == other.shape for mine, other in pairs]
        pairs = zip(_moments(ours), _moments(whole), strict=True)
        assert all(gone or torch.equal(mine, other) for gone, (mine, other) in zip(nans, pairs, strict=True))
        assert len(ours.lost) == sum(nans) and not whole.lost
        lost, found = lost + sum(nans), found + len(nans) - sum(nans)
    assert lost > 5 and found > 10


def _moments(step: Step) -> list[torch.Tensor]:
    return [moments for batch in step.batches for moments in batch.moments or []]


def test_names_tell_files_and_sizes_apart() -> None:
    names = {image_name(blob, *size) for blob in (b"a", b"b") for size in ((16, 32), (32, 16), (32, 32))}
    assert len(names) == 6


@pytest.mark.slow
def test_a_run_has_the_same_losses_with_the_cache(shapes: Path, weights: str, tmp_path: Path) -> None:
    """FLUX moments in fp32: latents are drawn in training with the seeds of the run without a cache, bit for bit."""
    root = Path(__file__).parents[2]
    data = [
        f"data.root={shapes}",
        "data.builder=none",
        "model.vae.codec=flux",
        f"model.vae.path={weights}",
        "model.vae.channels=3",
    ]
    data += ["model.vae.width=32", "model.vae.width_multipliers=[1,1,1,1]", "model.vae.res_blocks=1"]
    options = [*data, "train.steps=2", "train.packs_per_step=2", "telemetry.tensorboard=false", "checkpoint.every=0"]
    config = str(root / "examples/configs/tiny.yaml")

    def megabagel(*words: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "megabagel", *words], cwd=root, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def losses(name: str, *more: str) -> list[tuple[float, float]]:
        megabagel("train", config, *options, f"run.dir={tmp_path}/{name}", *more)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [(line["loss_mse"], line["grad_norm"]) for line in map(json.loads, lines)]

    plain = losses("plain")
    megabagel("data", "latents", config, str(tmp_path / "cache"), *data)
    assert losses("cached", f"data.latents={tmp_path}/cache") == plain
