"""A small model with random weights, and folders of drawn pages whose contents are known."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.data.builders.scenes_text import Prompt, all_prompts
from megabagel.evaluation.shapes_suite import scene_of
from megabagel.posttrain.journal import Journal
from megabagel.sequence.keys import generator


@pytest.fixture(scope="session")
def model() -> Any:
    """A `Pipeline` on one device whose every weight is keyed by its name."""
    import torch

    from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, ResizeConfig, VitConfig
    from megabagel.inference.api import Pipeline
    from megabagel.inference.load import Source
    from megabagel.model.noise import normal
    from megabagel.runtime import cpu_backend
    from megabagel.sequence.keys import seed64

    cpu_backend.install()

    def fill(stage: torch.nn.Module) -> None:
        for name, parameter in stage.named_parameters():
            parameter.data.copy_(normal(seed64(0, name), *parameter.shape) * 0.3 + ("norm" in name))

    vit = VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=8)
    sizes = ModelConfig(layers=2, hidden=32, heads=4, kv_heads=2, ffn=48, vocab=264, vit=vit, latent_grid=8)
    data = DataConfig(vae_resize=ResizeConfig(64, 16), vit_resize=ResizeConfig(56, 14))
    config = Config(model=sizes, parallel=ParallelConfig(sp=False, chunk=16), data=data)
    return Pipeline(Source(Path("nowhere"), config, fill, "trained", "a digest"), cache_tokens=4096)


@cache
def page_prompts() -> list[Prompt]:
    """One prompt that is not held out of each of four kinds."""
    found = []
    for tag in ("single_object", "two_object", "counting", "position"):
        found.append(next(prompt for prompt in all_prompts(tag) if not prompt.held_out))
    return found


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with four pages as if drawn: the first two as asked, the third empty, the fourth of another prompt."""
    from megabagel.data.builders.scenes_page import Scene, render

    prompts, folder = page_prompts(), tmp_path / "work"
    scenes = [scene_of(prompt, generator(0, "page", n)) for n, prompt in enumerate(prompts)]
    pages = [render(scene, 64) for scene in (*scenes[:2], Scene(()), scenes[0])]
    (folder / "images").mkdir(parents=True)
    journal = Journal(folder / "drawn.jsonl", "image_file", {})
    for number, (prompt, page) in enumerate(zip(prompts, pages, strict=True)):
        name, item = f"{number}_0.png", prompt.to_json()
        page.save(folder / "images" / name)
        record = {"image_file": name, "id": str(number), "candidate": 0, "prompt": item.pop("prompt"), "item": item}
        journal.append({**record, "size": [64, 64]})
    return folder


def pixels(path: Path) -> np.ndarray:
    """RGB of a PNG."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))
