"""Check the planner against published measurements of other systems: `python benchmarks/planner_anchors.py`.

Every row is described as a model and a grid in the planner's own terms and goes through the same functions as a plan.
What a publication does not say (global batch, grid, shapes) is assumed here, in the open. Prints the table of
docs/planner.md and writes benchmarks/results/planner_anchors.json.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from megabagel.config.load import load
from megabagel.config.schema import Config, DataConfig, ModelConfig, ParallelConfig, TrainConfig
from megabagel.planner.calibration import Calibration
from megabagel.planner.grid import Grid, Recompute
from megabagel.planner.hardware import CATALOG
from megabagel.planner.memory import peak
from megabagel.planner.scenario import Case, System
from megabagel.planner.step import step_time
from megabagel.planner.workload import Workload, typical_workload
from megabagel.sequence.items import Item, Latent, Text
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import build_pack
from megabagel.sequence.sample import Dropout, plan_sample

HERE = Path(__file__).resolve().parent
MEGATRON = System("Megatron-Core", overlaps_data=True, overlaps_tensor=True, fused=True)
FSDP = System("FSDP", shards_weights=True, overlaps_data=True)


@dataclass(frozen=True)
class Anchor:
    """One published measurement."""

    name: str
    system: System
    workload: Workload
    grid: Grid
    unit: str
    """TFLOP/s/GPU (every pair of a sample counted, seen or not), tokens/s/GPU or ms/step."""
    published: float
    fitted: bool
    assumed: str

    @property
    def case(self) -> Case:
        """In the planner's terms, on H100."""
        grid, load = self.grid, self.workload.load(self.grid.cp, self.grid.tp)
        return Case(grid.apply(self.workload.config), grid, load, CATALOG["h100"], self.system)

    def predicted(self, constants: Calibration) -> float:
        """In the row's unit."""
        case, seconds = self.case, step_time(self.case, constants).seconds
        tokens = case.micro_batches * self.workload.tokens / (case.grid.gpus / case.grid.dp)
        if self.unit == "tokens/s/GPU":
            return tokens / seconds
        if self.unit == "ms/step":
            return 1e3 * seconds
        flops = (
            self.workload.flops.official - 6 * case.config.model.vocab * case.config.model.hidden * self.workload.tokens
        )
        return flops / self.workload.tokens * tokens / seconds / 1e12


def dense(layers: int, hidden: int, heads: int, ffn: int, vocab: int, kv_heads: int | None = None) -> ModelConfig:
    """A plain transformer: one expert, no images."""
    return ModelConfig(
        variant="dense",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads or heads,
        ffn=ffn,
        vocab=vocab,
        qk_norm=False,
        qkv_bias=False,
        visual_und=False,
        visual_gen=False,
    )


def packed(
    model: ModelConfig, item: Item, length: int, per_micro_batch: int, micro_batches: int, grid: Grid
) -> Workload:
    """Micro-batches of equal sequences of `length` tokens, laid out without padding."""
    config = Config(
        model=model,
        parallel=ParallelConfig(chunk=8),
        data=DataConfig(max_tokens=length * per_micro_batch),
        train=TrainConfig(packs_per_step=micro_batches * grid.dp, ema=0.0),
    )
    samples = [plan_sample([item], SampleKey(0, "row", i, 0), Dropout()) for i in range(per_micro_batch)]
    return Workload(config, (build_pack(samples),))


def grid(tp: int, pp: int, dp: int, vpp: int = 1, cp: int = 1, recompute: Recompute = "none") -> Grid:
    """A bf16 grid."""
    return Grid(tp, pp, vpp, cp, dp, recompute, "bf16")


def megatron(
    size: str, tflops: float, layers: int, hidden: int, heads: int, g: Grid, micro: int, batch: int, fitted: bool
) -> Anchor:
    """GPT of the README of Megatron-LM: sequences of 4,096 tokens, 131,072 words. Its table gives size, GPUs and
    TFLOP/s; layers and width are those that make the size, tp x pp x 48 the grid that makes the GPUs. An ungated MLP of
    4 h costs what a gated one of 8/3 h does."""
    ffn = round(8 * hidden / 3 / 64) * 64
    work = packed(
        dense(layers, hidden, heads, ffn, 131072), Text(0, 4094, loss=True), 4096, micro, batch // 48 // micro, g
    )
    assumed = f"{layers} layers of {hidden}; {g}; {batch} sequences, {micro} per micro-batch"
    return Anchor(f"Megatron-Core GPT {size}, {g.gpus} H100", MEGATRON, work, g, "TFLOP/s/GPU", tflops, fitted, assumed)


def torchtitan() -> Anchor:
    """Llama-3.1-8B, 8 H100, FSDP without torch.compile. Its selective recomputation repeats every second matrix
    product of a layer, which costs what recomputing half of the layers does."""
    g = grid(1, 1, 8, recompute="full")
    work = packed(dense(32, 4096, 32, 14336, 128256, 8), Text(0, 8190, loss=True), 8192, 2, 1, g)
    return Anchor(
        "torchtitan Llama-3.1-8B, 8 H100",
        replace(FSDP, recomputed_layers=16),
        work,
        g,
        "tokens/s/GPU",
        5762,
        True,
        "2 sequences of 8,192 per GPU",
    )


def wan() -> Anchor:
    """Wan 2.1 14B: 40 layers of 5,120, an ungated MLP of 13,824 and cross-attention to a text, together a gated MLP of
    12,632; full attention over 37,440 tokens."""
    g = grid(2, 1, 16, cp=4)
    model = replace(dense(40, 5120, 40, 12632, 8), visual_gen=True, latent_grid=512)
    work = packed(model, Latent(0, 37438 // 34, 34, noised=False), 37440, 1, 8, g)
    return Anchor("Wan 2.1 14B, 128 H100", MEGATRON, work, g, "TFLOP/s/GPU", 325.77, False, f"{g}; 8 micro-batches")


def bagel() -> Anchor:
    """BAGEL-7B in Megatron Bridge, 32 H100, FSDP, whole layers recomputed in 23 of 28."""
    system = replace(FSDP, name="Megatron Bridge", recomputed_layers=23, fused=True)
    g = grid(1, 1, 32, recompute="full")
    overrides = ["model.vae.path=setup.py", "data.min_tokens=32768", "data.max_tokens=34816", "train.packs_per_step=32"]
    config = load(HERE.parent / "examples" / "configs" / "bagel_7b_released.yaml", overrides)
    assumed = "one pack of 34,816 tokens per GPU and step; the released mixture with typical samples"
    return Anchor(
        "BAGEL-7B Megatron Bridge, 32 H100", system, typical_workload(config), g, "ms/step", 7697, False, assumed
    )


def anchors() -> list[Anchor]:
    """All rows."""
    return [
        megatron("1.7B", 408.8, 24, 2048, 16, grid(1, 1, 48), 4, 192, fitted=False),
        megatron("7.1B", 465.9, 30, 4096, 32, grid(2, 1, 48), 2, 384, fitted=True),
        megatron("16B", 489.1, 32, 6144, 48, grid(4, 1, 48), 2, 576, fitted=False),
        megatron("70B", 419.7, 84, 8192, 64, grid(8, 2, 48, vpp=6), 1, 768, fitted=False),
        megatron("177B", 432.8, 96, 12288, 96, grid(8, 6, 48, vpp=4), 1, 1152, fitted=True),
        megatron("462B", 459.9, 112, 18432, 144, grid(8, 16, 48, vpp=7), 1, 1536, fitted=False),
        torchtitan(),
        wan(),
        bagel(),
    ]


def main() -> None:
    """Print the table and write it down."""
    constants, rows = Calibration(), []
    print(
        "| system | unit | published | predicted | error | fitted | assumed |\n"
        "| --- | --- | --- | --- | --- | --- | --- |"
    )
    for anchor in anchors():
        value = anchor.predicted(constants)
        error = value / anchor.published - 1
        fitted = "yes" if anchor.fitted else ""
        print(
            f"| {anchor.name} | {anchor.unit} | {anchor.published:,.1f} | {value:,.1f} | {error:+.1%} | {fitted} | "
            f"{anchor.assumed} |"
        )
        rows.append(
            {
                "name": anchor.name,
                "unit": anchor.unit,
                "published": anchor.published,
                "predicted": value,
                "error": error,
            }
        )
    memory = peak(anchors()[-1].case).gib
    print(f"\nMemory of the BAGEL row: published 58.6 GiB, predicted {memory:.1f} GiB ({memory / 58.6 - 1:+.1%})")
    rows.append(
        {"name": "BAGEL memory", "unit": "GiB", "published": 58.6, "predicted": memory, "error": memory / 58.6 - 1}
    )
    (HERE / "results" / "planner_anchors.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
