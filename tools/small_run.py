"""The run that is hurt by kill_test.py and fault_table.py: tiny.yaml, made smaller, on a few drawn shapes."""

from pathlib import Path

from megabagel.data.builders.toy_shapes import write_shapes

CONFIG = Path(__file__).resolve().parent.parent / "examples/configs/tiny.yaml"
SETTINGS = (
    *("model.layers=2", "model.hidden=32", "model.ffn=32", "model.vit.layers=1", "model.vit.hidden=32"),
    *("model.vit.ffn=32", "data.min_tokens=100", "data.max_tokens=160", "data.lookahead=8", "data.builder=none"),
    *("train.packs_per_step=2", "train.ema=0.9", "telemetry.tensorboard=false", "telemetry.peak_tflops=1"),
)
"""Steps of some ten milliseconds."""


def write_data(root: Path) -> None:
    """Write its data set."""
    write_shapes(root, samples=60, size=64, seed=0)
