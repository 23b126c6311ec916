"""`megabagel serve` as a real process on a tiny model with random weights."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.config.schema import ModelConfig, VitConfig
from tests.support.cli_harness import HERE, PLACE

MODEL = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=300,
    vit=VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=8),
    latent_grid=8,
)
"""Pictures of up to 128 x 128 pixels, 64 latent tokens; texts are bytes."""


def publish_tiny(folder: Path) -> Path:
    """A published folder with weights that give pictures with structure and texts without an early end."""
    import torch

    from megabagel.checkpoint.hf.names import official_shapes, table_sides
    from megabagel.model.noise import normal
    from megabagel.model.positions import sincos_table
    from megabagel.sequence.keys import seed64
    from tests.support.published import publish

    sides = table_sides(MODEL)
    tensors: dict[str, torch.Tensor] = {
        name: sincos_table(MODEL.hidden, sides[name])
        if name in sides
        else (normal(seed64(0, name), *shape) * 0.3 + ("norm" in name)).to(torch.bfloat16)
        for name, shape in official_shapes(MODEL).items()
    }
    return publish(folder, tensors, MODEL)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    name: str
    process: subprocess.Popen[str]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 30.0) -> tuple[int, str]:
        """Send a signal; returns exit code and stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=seconds)
        return self.process.returncode, errors


@contextmanager
def serving(folder: Path, *options: Any, **env: str) -> Iterator[Served]:
    """Serve `folder` on a free port of this machine inside the block; killed at the end if it still runs."""
    clean = {name: value for name, value in os.environ.items() if name not in PLACE}
    words = ["serve", folder, "--port", 0, *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "megabagel", *map(str, words)],
        env={**clean, "OMP_NUM_THREADS": "1", **env},
        cwd=HERE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline()
        assert " at http" in line, process.stderr.read()
        yield Served(line.rpartition(" at ")[2].strip(), line.split()[1], process)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
