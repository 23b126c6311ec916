"""What the chip can do at best, by torch's own kernels: everything else is held against it."""

import torch
from torch.nn.functional import scaled_dot_product_attention

from gpu_suite_parts.report import Report, Result
from gpu_suite_parts.setting import Setting, smi
from gpu_suite_parts.timing import forward_and_backward, median_ms


def run(setting: Setting, report: Report) -> None:
    """A large product, a copy, and attention without a mask."""
    report.measure("ceilings", "gemm", "torch", lambda: gemm(setting))
    report.measure("ceilings", "copy", "torch", lambda: copy(setting))
    report.measure("ceilings", "unmasked attention", "torch", lambda: attention(setting))


def gemm(setting: Setting) -> Result:
    """bf16 product of two square matrices of normal numbers."""
    size = setting.pick(8192, 64)
    a, b = (setting.normal(size, size, key=f"gemm {name}") for name in "ab")
    time_ms = median_ms(setting, lambda: a @ b)
    if setting.toy:
        return {"forward_ms": time_ms}
    for _ in range(500):  # about a second of work, during which the clock is read
        torch.mm(a, b)
    clock = smi("clocks.sm", "power.draw")
    torch.cuda.synchronize()
    return {"forward_ms": time_ms, "tflops": 2 * size**3 / time_ms / 1e9} | clock


def copy(setting: Setting) -> Result:
    """2 GB read and written."""
    size = setting.pick(2**31, 2**12)
    source = torch.arange(size // 8, device=setting.device)
    target = torch.empty_like(source)
    time_ms = median_ms(setting, lambda: target.copy_(source))
    return {"forward_ms": time_ms} | setting.pick({"gb_per_s": 2 * size / time_ms / 1e6}, {})


def attention(setting: Setting) -> Result:
    """Full attention of 28 heads over 8K tokens, by whichever kernel torch prefers."""
    tokens, heads, head_dim = setting.pick((8192, 28, 128), (16, 2, 16))
    qkv = [setting.normal(1, heads, tokens, head_dim, key=f"ceiling {name}") for name in "qkv"]
    found = forward_and_backward(setting, scaled_dot_product_attention, qkv)
    flops = 4 * heads * head_dim * tokens**2
    rates = {"tflops": flops / found["forward_ms"] / 1e9, "backward_tflops": 2.5 * flops / found["backward_ms"] / 1e9}
    return found | setting.pick(rates, {})
