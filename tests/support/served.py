"""A server on a tiny model with random weights: in a worker of a rank pool, or `megabagel serve` as a real process."""

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megabagel.config.schema import ModelConfig, VitConfig
from tests.support.cli_harness import HERE, PLACE
from tests.support.pictures import file_of, noise
from tests.support.rank_pool import RankPool

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


KEY = "sk-of-a-test"
QUEUE = 24
LIMITS = {"queue": QUEUE, "body": 2**20, "pixels": 20_000}
IMAGES = [file_of(noise(64, 48, seed=1)), file_of(noise(96, 96, seed=2))]
"""PNG files to be shown to the model."""
DRAW = {"seed": 3, "size": (64, 48), "points": 5}
EDIT = {"seed": 4, "points": 4}
TEXT = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 5}


@dataclass(frozen=True)
class InPool:
    """A server in a worker."""

    url: str
    pid: int
    expected: dict[str, Any]
    """What the Python interface gives for the same requests, computed before the server started."""


def expected(model: Any) -> dict[str, Any]:
    """Answers and PNGs (base64) of some requests by the Python interface."""

    def png(pictures: list[Any]) -> list[str]:
        return [base64.b64encode(picture.png()).decode() for picture in pictures]

    return {
        "draw": png(model.generate("a red circle", n=2, **DRAW)),
        "edit": png(model.edit(IMAGES, "make it blue", **EDIT)),
        "ask": model.ask(IMAGES[:1], "what is it?", **TEXT),
        "talk": model.ask([], "hello", **TEXT),
        "greedy": model.ask([], "hello", max_new_tokens=24),
    }


def serve_in_worker(folder: str, ready: str) -> int:
    """Serve until SIGTERM, in the main thread of a worker; writes the address to `ready`."""
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megabagel.inference.api import load_pretrained
    from megabagel.serve.limits import Limits
    from megabagel.serve.server import listen, serve, url_of

    os.environ["MEGABAGEL_API_KEY"] = KEY
    model = load_pretrained(folder, overrides=("train.precision=fp32",), cache_tokens=4096)
    found = expected(model)
    listener = listen("127.0.0.1", 0)
    told = {"url": url_of(listener), "pid": os.getpid(), "expected": found}
    Path(ready + ".part").write_text(json.dumps(told))
    Path(ready + ".part").rename(ready)
    return serve(model, listener, "tiny", Limits(**LIMITS), drain=10.0, ranks=1)


@contextmanager
def serving_in_pool(folder: Path) -> Iterator[InPool]:
    """Serve a tiny model in a process that has megatron-core imported already; it must end well at SIGTERM."""
    pool, ready, codes = RankPool(), folder / "ready.json", []
    publish_tiny(folder / "tiny")
    thread = threading.Thread(
        # The pool ends what outlives its limit: a server lives as long as the tests that use it.
        target=lambda: codes.extend(pool.run(1, serve_in_worker, str(folder / "tiny"), str(ready), timeout=3600.0))
    )
    thread.start()
    try:
        while not ready.exists():
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.05)
        yield InPool(**json.loads(ready.read_text()))
        os.kill(json.loads(ready.read_text())["pid"], signal.SIGTERM)
        thread.join(30)
        assert codes == [0]
    finally:
        pool.close()
        thread.join()


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
