"""How fast one CPU thread runs forward and backward of the whole model, beside its own matrix products.

    python benchmarks/model_step.py [--runs 9] [--profile] [--out FILE]

One pack of mixed samples (text to image, editing, VLM, text; 2,200 tokens) goes through the real sequence, input and
attention code in fp32. Rounds alternate between the model and plain matrix products, so that both meet the same load
of the machine; medians are printed. The share is the model's rate over that of the products.

Counted are the matrix products that the batch cannot do without: projections of real tokens, exactly visible
(query, key) pairs, the ViT tower, the word head on rows with loss; backward is twice forward. Padding rows, masked
pairs, attention scores made again in backward, norms and everything else elementwise cost time and earn nothing.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, VitConfig
from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.model.inputs import Outputs, StageInputs
from megabagel.model.vae_blocks import BlockCodec
from megabagel.parallel.attention import HOST
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import distributed
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.flops import needed_flops
from megabagel.sequence.images import vae_images, vit_images
from megabagel.sequence.items import Item, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import build_pack
from megabagel.sequence.rank_rows import LatentWeights, RankPlace
from megabagel.sequence.sample import TEXT, Dropout, plan_sample

CAPTION = [Text(0, 40), Latent(1, 16, 16, noised=True)]
EDIT = [Latent(0, 16, 16, noised=False), Vit(0, 16, 16), Text(1, 30), Latent(2, 16, 16, noised=True)]
QUESTION = [Vit(0, 16, 16), Text(1, 50), Text(2, 120, loss=True)]
SAMPLES: list[list[Item]] = [CAPTION, CAPTION, EDIT, QUESTION, [Text(0, 360, loss=True)]]
"""Images of 256 (latents) and 224 (ViT) pixels a side."""

GEMM = 2048
"""Rows, columns and depth of the products to compare with."""
PRODUCTS = 8
"""Of them per round: half as long as a step of the model."""


def benchmark_config() -> Config:
    """A model of 0.04 billion weights, both experts together, and a window that the pack fills."""
    vit = VitConfig(layers=2, hidden=192, heads=4, ffn=512)
    model = ModelConfig(layers=6, hidden=512, heads=8, kv_heads=2, ffn=1408, vocab=8192, vit=vit)
    return Config(model=model, data=DataConfig(max_tokens=2200), parallel=ParallelConfig(chunk=16))


def draw_batch(config: Config, weights: LatentWeights | None = None) -> PackedBatch:
    """The pack with random words and pixels; `weights` of its latent tokens in the flow loss."""
    keys = (SampleKey(0, "benchmark", number, 0) for number in range(len(SAMPLES)))
    pack = build_pack([plan_sample(items, key, Dropout()) for items, key in zip(SAMPLES, keys, strict=True)])
    batches = BatchBuilder(config, RankPlace(), HOST.plan)
    model, draw = config.model, torch.Generator().manual_seed(0)
    patch, side = 3 * model.vit.patch**2, model.latent_stride
    return batches.build(
        batches.lay_out(pack),
        torch.randint(model.vocab, (int((pack.kind_S == TEXT).sum()),), generator=draw).numpy(),
        patches=[torch.rand(i.rows * i.cols, patch, generator=draw) * 2 - 1 for _, i in vit_images(pack)],
        pixels=[torch.rand(3, i.rows * side, i.cols * side, generator=draw) * 2 - 1 for i in vae_images(pack)],
        latent_weights=weights,
    )


def build_model(config: ModelConfig) -> Bagel:
    """The whole model with normal weights: products of zeros would be no measure."""
    model, draw = Bagel(config, SingleDevice()), torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=config.init_std, generator=draw)
    return model


def step(model: Bagel, inputs: StageInputs) -> None:
    """Forward and backward with fresh gradients."""
    model.zero_grad()
    outputs = model(inputs)
    assert isinstance(outputs, Outputs)
    (0.25 * outputs.ce_Q.mean() + outputs.mse_g.mean()).backward()


def clocks(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model: Bagel, inputs: StageInputs, flops: float, runs: int) -> dict[str, float]:
    """Medians over alternating rounds, after one to warm up, by both clocks: other load moves that of the CPU less."""
    a, b = torch.randn(2, GEMM, GEMM, generator=torch.Generator().manual_seed(2))
    of_model, of_gemm = [], []
    for _ in range(runs + 1):
        of_model.append(clocks(lambda: step(model, inputs)))
        of_gemm += [clocks(lambda: a @ b) for _ in range(PRODUCTS)]
    result = {}
    for number, clock in enumerate(("wall", "cpu")):
        model_s = statistics.median(times[number] for times in of_model[1:])
        gemm_s = statistics.median(times[number] for times in of_gemm[PRODUCTS:])
        rate, gemm_rate = flops / model_s / 1e9, 2 * GEMM**3 / gemm_s / 1e9
        found = {"seconds": model_s, "gflops": rate, "gemm_gflops": gemm_rate, "share": rate / gemm_rate}
        result |= {f"{clock}_{name}": value for name, value in found.items()}
    return result


def surroundings() -> dict[str, str]:
    """What a number must be read with: versions, processor, date and commit."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": cpu.partition(":")[2].strip(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed rounds")
    parser.add_argument("--profile", action="store_true", help="print the operations that take the most time")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    arguments = parser.parse_args()

    config = benchmark_config()
    batch, model = draw_batch(config), build_model(config.model)
    with distributed(config) as mesh:
        torch.set_num_threads(1)
        inputs = InputBuilder(config, mesh, BlockCodec(), torch.device("cpu")).build(batch)
        flops = needed_flops(batch.pack, config.model)
        result: dict[str, Any] = {"tokens": batch.pack.tokens, "rows": batch.layout.rows, "gflop": flops / 1e9}
        result |= measure(model, inputs, flops, arguments.runs)
        print(f"{batch.pack.tokens} tokens in {batch.layout.rows} rows, {flops / 1e9:.1f} GFLOP forward and backward")
        for clock in ("wall", "cpu"):
            line = "{0}: {1:.3f} s, {2:.1f} GFLOP/s; matrix products {3:.1f} GFLOP/s; share {4:.1%}"
            values = (result[f"{clock}_{name}"] for name in ("seconds", "gflops", "gemm_gflops", "share"))
            print(line.format(clock, *values))
        if arguments.profile:
            with profile() as found:
                step(model, inputs)
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=60))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result | surroundings(), indent=2) + "\n")


if __name__ == "__main__":
    main()
