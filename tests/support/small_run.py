"""A small run on drawn shapes: every task but one, a model of two layers, milliseconds per step."""

from pathlib import Path

from megabagel.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    ResizeConfig,
    RunConfig,
    SourceConfig,
    TelemetryConfig,
    TrainConfig,
    VitConfig,
)
from megabagel.data.builders.toy_shapes import write_shapes
from megabagel.data.plan.global_plan import Source, open_sources
from megabagel.data.tokenize.tokenizer import load_tokenizer

SCENES = 60
"""Scenes; there are half as many edits, a quarter as many clips and notes."""


def write_data(root: Path) -> None:
    """Pages are 48 x 48, 48 x 36 or 60 x 48 pixels: 3 x 3, 2 x 3 or 3 x 4 latent tokens."""
    write_shapes(root, samples=SCENES, size=48, seed=0)


def small_config(root: Path, run: Path = Path("nowhere")) -> Config:
    """The run. Packs of 100 to 128 tokens hold two to five samples; no sample is longer than a pack."""
    return Config(
        run=RunConfig(dir=str(run)),
        model=ModelConfig(
            layers=2,
            hidden=32,
            heads=4,
            kv_heads=2,
            ffn=48,
            vit=VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=8),
            latent_grid=8,
            init_std=0.1,
        ),
        parallel=ParallelConfig(chunk=8),
        data=DataConfig(
            root=str(root),
            sources=(
                SourceConfig("draw", "scenes-*.tar", "t2i", 4.0),
                SourceConfig("caption", "scenes-*.tar", "i2t", 2.0),
                SourceConfig("edit", "edits-*.tar", "edit", 2.0),
                SourceConfig("clips", "clips-*.tar", "video", 1.0),
                SourceConfig("notes", "notes-*.tar", "text", 2.0),
            ),
            tokenizer=str(root / "tokenizer.json"),
            min_tokens=100,
            max_tokens=128,
            lookahead=12,
            vae_resize=ResizeConfig(max_size=64, min_size=32),
            vit_resize=ResizeConfig(max_size=56, min_size=28),
        ),
        train=TrainConfig(steps=6, seed=5, packs_per_step=4, lr=5e-3, warmup=2, ema=0.9),
        telemetry=TelemetryConfig(tensorboard=False, peak_tflops=1.0, sample_size=(32, 48), sample_steps=3),
    )


def sources_of(config: Config) -> list[Source]:
    """The run's sources, indexed."""
    return open_sources(config, load_tokenizer(config.data.tokenizer))
