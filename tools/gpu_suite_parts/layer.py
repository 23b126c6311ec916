"""One whole Mixture-of-Transformers layer of the 7B model, forward and backward, and its share of the chip's peak.

Counted are the products of the projections and of visible (query, key) pairs; backward is twice forward. Norms,
rotation, SwiGLU and attention scores made again take time and earn nothing.

Letters: S rows [und | gen], I hidden width.
"""

from collections.abc import Callable
from functools import partial

import torch
from megabagel_kernels.attention.configs import configs_here
from megabagel_kernels.attention.triton import plan_triton, triton_attention
from torch import Tensor

from gpu_suite_parts.packs import Rows, pack_of, rows_of
from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting
from gpu_suite_parts.timing import median_ms
from megabagel.config.schema import ModelConfig
from megabagel.model.factory import SingleDevice
from megabagel.model.inputs import Rope
from megabagel.model.kernels import TORCH, Kernels, triton_kernels
from megabagel.model.layers import Layer
from megabagel.model.positions import rope_tables
from megabagel.sequence.flops import branch_parameters
from megabagel.sequence.items import DELIMITERS, Item, Latent, Text
from megabagel.train.throughput import data_sheet_peak

SEVEN_B = ModelConfig(layers=1, hidden=3584, heads=28, kv_heads=4, ffn=18_944)
TOY = ModelConfig(layers=1, hidden=64, heads=4, kv_heads=2, ffn=96)

SHARES = ((1, 0), (1, 1), (1, 9))
"""und : gen. Text alone, editing, text to image."""


def run(setting: Setting, report: Report) -> None:
    """All shares at two lengths, with both kinds of kernels between the linears."""
    for tokens in setting.pick((32_768, 16_384), (80,)):
        for und, gen in setting.pick(SHARES, SHARES[1:2]):
            for kernels, needed in ((triton_kernels(), {"norm", "rope", "swiglu"}), (TORCH, set())):
                work = partial(measure, setting, report, kernels, tokens, und, gen)
                item = f"{tokens} tokens, und:gen {und}:{gen}, {kernels.name}"
                report.measure("layer", item, next(iter(needed & report.broken), "attention"), work)


def measure(setting: Setting, report: Report, kernels: Kernels, tokens: int, und: int, gen: int) -> Result:
    """Times of a layer in bf16, and how much of the peak its needed products reach."""
    config = setting.pick(SEVEN_B, TOY)
    rows = rows_of(pack_of(samples(setting.pick(64, 6), tokens, und, gen)))
    layer, num_und = build(setting, config, kernels), rows.num_und
    step, forward = steps(setting, config, layer, rows)
    with torch.no_grad():
        forward_ms = median_ms(setting, forward)
    if not setting.toy:
        torch.cuda.reset_peak_memory_stats()
        step()
        peak_gib = torch.cuda.max_memory_allocated() / 2**30
    step_ms = median_ms(setting, step)
    total = rows.ranges.queries
    found: Result = {"und": num_und, "gen": total - num_und, "forward_ms": forward_ms, "step_ms": step_ms}
    if setting.toy:
        return found
    pairs = int(rows.pack.visible_S.sum())
    flops = 6 * branch_parameters(config) * total + 12 * config.heads * config.kv_channels * pairs
    rate = flops / step_ms / 1e9
    found |= {"tflops": rate, "peak_gib": peak_gib}
    peak = peak_tflops(torch.cuda.get_device_name())
    if peak is not None:
        found["mfu"] = rate / peak
    gemm = report.ceiling("gemm", "tflops")
    return found if gemm is None else found | {"of_gemm": rate / gemm}


def peak_tflops(device: str) -> float | None:
    """Dense bf16 peak of a GPU by its name; None where no data sheet is known."""
    known = data_sheet_peak(device)
    return known.flops / 1e12 if known else None


def samples(side: int, tokens: int, und: int, gen: int) -> list[list[Item]]:
    """Samples of a text and, where there are gen rows, a square noised image, that fill about `tokens` tokens."""
    if gen == 0:
        return [[Text(0, tokens // 4 - DELIMITERS, loss=True)]] * 4
    image = side * side
    words = image * und // gen - 2 * DELIMITERS  # the image's delimiters are und rows, too
    sample: list[Item] = [Text(0, words), Latent(1, side, side, noised=True)]
    return [sample] * max(1, tokens // (image + words + 2 * DELIMITERS))


def build(setting: Setting, config: ModelConfig, kernels: Kernels) -> Layer:
    """A layer with normal weights in bf16."""
    with torch.device(setting.device):
        layer = Layer(config, SingleDevice(kernels)).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "norm" not in name:
                parameter.copy_(config.init_std * setting.normal(*parameter.shape, key=name))
    return layer


def steps(
    setting: Setting, config: ModelConfig, layer: Layer, rows: Rows
) -> tuple[Callable[[], object], Callable[[], object]]:
    """(forward and backward to inputs and weights, forward alone)."""
    plan = plan_triton(rows.ranges, configs_here(torch.bfloat16, config.kv_channels)).to(setting.device)
    position_S = torch.from_numpy(rows.pack.position_S[rows.token_S]).to(setting.device)
    rope = Rope(*rope_tables(position_S, config.kv_channels, config.rope_base))
    counts = rows.num_und, rows.ranges.queries - rows.num_und
    hidden = [setting.normal(count, config.hidden, key="hidden").requires_grad_() for count in counts]
    grads = [setting.normal(count, config.hidden, key="upstream") for count in counts]
    leaves = [*hidden, *layer.parameters()]

    def forward() -> tuple[Tensor, Tensor]:
        return layer(*hidden, rope, partial(triton_attention, plan=plan))

    def step() -> object:
        return torch.autograd.grad(forward(), leaves, grads)

    return step, forward
