"""What a weight per latent token costs in a step: time and kept bytes with and without, in alternating rounds.

    python benchmarks/reward_weights.py [--runs 9] [--out FILE]

The pack and model are those of `model_step.py`; the weights are random, of both signs (SRUM equation 3).
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from model_step import benchmark_config, build_model, clocks, draw_batch, step, surroundings

from megabagel.model.bagel import Bagel
from megabagel.model.inputs import StageInputs
from megabagel.model.vae_blocks import BlockCodec
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import distributed
from megabagel.sequence.rank_rows import LatentWeights


def kept_bytes(model: Bagel, inputs: StageInputs) -> int:
    """Bytes of distinct storages that one forward pass keeps for backward, parameters apart."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, inputs)
    return sum(kept.values())


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="timed rounds")
    parser.add_argument("--out", type=Path, help="write a JSON file")
    arguments = parser.parse_args()
    config, draw = benchmark_config(), np.random.default_rng(0)
    count = int((draw_batch(config).pack.kind_S == 2).sum())
    weights = {
        "plain": None,
        "weights": LatentWeights(draw.uniform(-0.5, 1.5, count).astype(np.float32)),
    }
    model, result = build_model(config.model), {}
    with distributed(config) as mesh:
        torch.set_num_threads(1)
        builder = InputBuilder(config, mesh, BlockCodec(), torch.device("cpu"))
        inputs = {name: builder.build(draw_batch(config, weight)) for name, weight in weights.items()}
        seconds: dict[str, list[float]] = {name: [] for name in inputs}
        for _ in range(arguments.runs + 1):
            for name, one in inputs.items():
                seconds[name].append(clocks(lambda one=one: step(model, one))[1])
        for name, one in inputs.items():
            result[name] = {"cpu_s": statistics.median(seconds[name][1:]), "kept_bytes": kept_bytes(model, one)}
    pairs = zip(seconds["weights"][1:], seconds["plain"][1:], strict=True)
    ratios = sorted(with_weights / plain for with_weights, plain in pairs)
    result["ratio"] = {"median": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]}
    for name, found in result.items():
        print(name, found)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result | surroundings(), indent=2) + "\n")


if __name__ == "__main__":
    main()
