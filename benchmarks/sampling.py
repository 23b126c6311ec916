"""Speed of inference on one CPU thread in GEMM-equivalents: pictures, edits and text, beside the official code.

    python benchmarks/sampling.py [--runs 7] [--only guided,decode_66] [--json FILE]

A GEMM-equivalent is the arithmetic, in GFLOP, that plain matrix products would do in the CPU time of a run. Their rate
is taken before and after each run, so that other load on the machine cancels out to first order. Medians are printed,
with the lowest and highest run.

The model has 6 layers, hidden 512, 8 query and 2 key/value heads, FFN 1408, fp32. Pictures have 256 x 256 pixels and 20
evaluations, prompts 66 tokens. Prefill is not part of a run; it has keys of its own.

    guided          text guidance 4 in all evaluations (arithmetic: 388 GFLOP)
    gradio          text 4 and image 1.5 in 0.4 < t <= 1: the image-free branch equals the main one
    edit            text 4 and image 2 in all evaluations, one input image
    decode_66, _360 64 greedy tokens after 66 and 360 tokens
    prefill_text, prefill_image
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megabagel.config.schema import Config, ModelConfig, ParallelConfig, VitConfig
from megabagel.inference import programs, requests
from megabagel.inference.build import build_runner
from megabagel.inference.contexts import ImageContent
from megabagel.inference.decoding import TextSettings
from megabagel.inference.engine import Engine
from megabagel.inference.presets import PRESETS, adjusted
from megabagel.model.noise import normal
from megabagel.parallel.attention import HOST
from megabagel.sequence.keys import seed64
from megabagel.sequence.sample import LATENT, VIT

MODEL = ModelConfig(
    layers=6, hidden=512, heads=8, kv_heads=2, ffn=1408, vocab=1000, latent_grid=16, vit=VitConfig(grid=20)
)
SPECIAL = programs.Special(0, 1, 2, 3)
SIDE = 16
"""Latent tokens per side of a picture."""
POINTS = 21
"""Grid points: 20 evaluations."""
NEW_TOKENS = 64
BATCHES = (1, 2, 4, 8)
GEMM = 1024
"""Rows, columns and depth of the products that give the rate."""
PRODUCTS = 12

Run = Callable[[], object]


def build_engine() -> Engine:
    """The engine with normal weights. The row of eos in the head is zero, so that no text ends early."""

    def fill(stage: torch.nn.Module) -> None:
        for name, parameter in stage.named_parameters():
            parameter.data.copy_(normal(seed64(0, name), *parameter.shape) * 0.02 + ("norm" in name))
            if name == "heads.lm_head.weight":
                parameter.data[SPECIAL.eos] = 0

    config = Config(model=MODEL, parallel=ParallelConfig(sp=False))
    return Engine(build_runner(config, None, HOST, fill, cache_tokens=16384), SPECIAL)


def text(tokens: int, number: int = 0) -> tuple[int, ...]:
    """Ids of a text that takes `tokens` rows with its delimiters."""
    return tuple(10 + (7 * i + number) % 900 for i in range(tokens - 2))


def picture() -> tuple[ImageContent, ...]:
    """An input image: 256 clean latents and 36 patches."""
    return (
        ImageContent(LATENT, SIDE, SIDE, normal(1, SIDE * SIDE, MODEL.latent_dim)),
        ImageContent(VIT, 6, 6, normal(2, 36, 588)),
    )


def shown(engine: Engine, items: list[requests.Item]) -> programs.Session:
    """A session whose contexts have been computed."""
    session = engine.session()
    requests.show(session, items)
    found = session.branches
    needed = [found.main, found.text_free, found.image_free]
    engine.run(programs.prefill(session, needed), session, 2 * requests.tokens_of(items), ends_session=False)
    return session


def drawing(engine: Engine, items: list[requests.Item], preset: str, **changes: Any) -> Run:
    """Sampling of one picture."""
    session, settings = shown(engine, items), adjusted(PRESETS[preset].draw, points=POINTS, **changes)
    noise = programs.official_noise(0, SIDE * SIDE, MODEL.latent_dim)

    def run() -> object:
        program = requests.draw(session, (SIDE, SIDE), [noise], settings, PRESETS[preset])
        return engine.run(program, session, 3 * (SIDE * SIDE + 2), ends_session=False)

    return run


def decoding(engine: Engine, tokens: int) -> Run:
    """Decoding of 64 tokens."""
    session, settings = shown(engine, [text(tokens)]), TextSettings(max_new_tokens=NEW_TOKENS)

    def run() -> object:
        ids = engine.run(requests.answer(session, settings), session, NEW_TOKENS, ends_session=False)
        assert len(ids) == NEW_TOKENS
        return ids

    return run


def prefilling(engine: Engine, item: requests.Item) -> Run:
    """Prefill of one text or image."""

    def run() -> None:
        shown(engine, [item]).close()

    return run


CASES: dict[str, Callable[[Engine], Run]] = {
    "guided": lambda e: drawing(e, [text(66)], "notebook", interval=(-1.0, 1.0)),
    "gradio": lambda e: drawing(e, [text(66)], "gradio"),
    "edit": lambda e: drawing(e, [picture(), text(66)], "edit"),
    "decode_66": lambda e: decoding(e, 66),
    "decode_360": lambda e: decoding(e, 360),
    "prefill_text": lambda e: prefilling(e, text(66)),
    "prefill_image": lambda e: prefilling(e, picture()),
}


def batch(engine: Engine, size: int) -> None:
    """Guided pictures of different prompts, sampled together from prompt to latent tokens."""
    settings = adjusted(PRESETS["notebook"].draw, points=POINTS)
    for number in range(size):
        session = engine.session()
        requests.show(session, [text(66, number)])
        noise = programs.official_noise(number, SIDE * SIDE, MODEL.latent_dim)
        program = requests.draw(session, (SIDE, SIDE), [noise], settings, PRESETS["notebook"])
        engine.submit(program, session, 66 + 2 * (SIDE * SIDE + 2))
    while not engine.idle:
        engine.step()


def gemm_gflops() -> float:
    """Rate of plain matrix products: median over a quarter of a second."""
    a, b = torch.randn(2, GEMM, GEMM, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(PRODUCTS):
        start = time.process_time()
        a @ b
        seconds.append(time.process_time() - start)
    return 2 * GEMM**3 / statistics.median(seconds) / 1e9


def timed(run: Run) -> dict[str, float]:
    """CPU and wall seconds of one call, and the GEMM rate around it."""
    before = gemm_gflops()
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rate = (before + gemm_gflops()) / 2
    return {"cpu_seconds": cpu, "wall_seconds": wall, "gemm_gflops": rate, "gemm_equivalents": cpu * rate}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of runs, and the spread of their GEMM-equivalents."""
    found: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    values = [run["gemm_equivalents"] for run in runs]
    return {**found, "spread": [min(values), max(values)], "runs": len(runs)}


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7, help="timed runs of each key; default: 7")
    parser.add_argument("--only", metavar="KEY,...", help=f"of {', '.join(CASES)}, batches")
    parser.add_argument("--batch-runs", type=int, default=1, help="timed runs of each batch size; default: 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the medians and all details")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [*CASES, "batches"]
    if unknown := set(wanted) - {*CASES, "batches"}:
        parser.error(f"--only: unknown key {sorted(unknown)[0]!r}")
    torch.set_num_threads(1)
    from model_step import surroundings

    engine, details = build_engine(), {}
    for key in (key for key in CASES if key in wanted):
        run = CASES[key](engine)
        run()  # warms up
        details[key] = summary([timed(run) for _ in range(args.runs)])
        print(_line(key, details[key]), flush=True)
    images = _images_per_second(engine, args.batch_runs) if "batches" in wanted else {}
    if args.json:
        result = {key: found["gemm_equivalents"] for key, found in details.items()}
        more = {"details": details, "images_per_second": images, **surroundings()}
        args.json.write_text(json.dumps({**result, **more}, indent=1) + "\n")


def _line(key: str, found: dict[str, Any]) -> str:
    low, high = found["spread"]
    return (
        f"{key:14} {found['gemm_equivalents']:7.1f} GEMM-equivalents ({low:.1f} to {high:.1f}, {found['runs']} runs), "
        f"{found['cpu_seconds']:.3f} CPU s, GEMM {found['gemm_gflops']:.1f} GFLOP/s"
    )


def _images_per_second(engine: Engine, runs: int) -> dict[int, dict[str, Any]]:
    """Pictures per second, by pictures in a batch: notebook settings, prefill included."""
    batch(engine, 1)  # warms up
    found = {}
    for size in BATCHES:
        times = summary([timed(lambda: batch(engine, size)) for _ in range(runs)])  # noqa: B023
        rates = {f"per_{clock}_second": size / times[f"{clock}_seconds"] for clock in ("wall", "cpu")}
        found[size] = {**rates, "gemm_equivalents_per_image": times["gemm_equivalents"] / size, "runs": runs}
        print(
            f"batch {size}: {found[size]['per_wall_second']:.3f} images/s, "
            f"{found[size]['gemm_equivalents_per_image']:.0f} GEMM-equivalents per image ({runs} runs)",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
