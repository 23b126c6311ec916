"""`megabagel generate`, `edit`, `ask` and `chat` inside a warm worker process, and a tiny published model for them.

ranks.run(1, command, ["ask", folder, "what is it?"])     # what it returned and printed
"""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from megabagel.config.schema import ModelConfig, VitConfig

MODEL = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=264,
    vit=VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=5),
    latent_grid=4,
)
"""For the byte tokenizer; pictures of at most 64 pixels."""


@dataclass(frozen=True)
class Outcome:
    """What the command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


def tiny_model(folder: Path, variant: str = "mot") -> Path:
    """Write a published folder with weights under which pictures have contrast."""
    from tests.support.published import publish, weights

    model = replace(MODEL, variant=variant)
    scaled = {
        name: tensor if "pos_embed" in name else (tensor.float() * 0.3 + ("norm" in name)).to(tensor.dtype)
        for name, tensor in weights(model).items()
    }
    return publish(folder, scaled, model)


def command(words: Sequence[object], stdin: str = "", folder: Path | None = None, thought: int = 6) -> Outcome:
    """Run the command line in this process.

    Args:
        words: after `megabagel`.
        stdin: what the user types.
        folder: working folder.
        thought: most tokens of the thought before a picture.
    """
    from megabagel.cli import main
    from megabagel.inference.presets import PRESETS

    out, err, before = io.StringIO(), io.StringIO(), Path.cwd()
    short = {name: replace(p, thought=replace(p.thought, max_new_tokens=thought)) for name, p in PRESETS.items()}
    os.chdir(folder or before)
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            mock.patch("sys.stdin", io.StringIO(stdin)),
            mock.patch.dict(PRESETS, short),
        ):
            try:
                code = main([str(word) for word in words])
            except SystemExit as end:  # argparse
                code = int(end.code or 0)
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())
