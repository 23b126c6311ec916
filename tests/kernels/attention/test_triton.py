"""The Triton engine around its kernels: plans, refused inputs, shapes without a GPU, FLOP counts. Needs no Triton.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from megabagel_kernels.attention.configs import TABLE, Config, Configs, configs_for
from megabagel_kernels.attention.schedule import BlockLists, classify
from megabagel_kernels.attention.triton import TritonPlan, plan_triton, triton_attention, triton_attention_lse
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.attention.packs import Segment, ranges_of

RANGES = ranges_of([[Segment(20, "causal"), Segment(31, "noise")], [Segment(40, "full")]])
CONFIGS = Configs(Config(16, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 16, 4, 1), descriptors=True, split_below=0)
PLAN = plan_triton(RANGES, CONFIGS)


def qkv(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q [91, 4, 16], k and v [91, 2, 16]."""
    return [torch.zeros(RANGES.queries, heads, 16, dtype=dtype, device=device) for heads in (4, 2, 2)]


def test_the_plan_holds_the_schedule_of_each_kernel():
    ranges, code, *lists = PLAN.tensors
    assert ranges.shape == (4, 128)
    assert code.shape == (128,)
    assert all(x.dtype == torch.int32 for x in PLAN.tensors)
    assert ranges[:, 91:].eq(0).all()
    assert code[91:].eq(-1).all()
    expected = (
        BlockLists.of(classify(RANGES, 16, 32)),
        BlockLists.of(classify(RANGES, 32, 32)),
        BlockLists.of(classify(RANGES, 32, 16).T),
    )
    for found, made in zip(zip(lists[::2], lists[1::2], strict=True), expected, strict=True):
        assert np.array_equal(found[0], made.work)
        assert np.array_equal(found[1], made.blocks)
    assert PLAN.visible == 20 * 21 // 2 + 31 * 51 + 40 * 40


def test_planning_refuses_bad_codes():
    wrong = replace(RANGES, private_start=RANGES.private_start[:-1])
    with pytest.raises(
        ValueError, match=r"private_start: expected one entry per query \(91, as public_start\), found 90"
    ):
        plan_triton(wrong, CONFIGS)


def refused(message: str, q: Tensor, k: Tensor, v: Tensor, plan: TritonPlan = PLAN, scale: float | None = None) -> None:
    with pytest.raises(ValueError, match=message):
        triton_attention(q, k, v, plan, scale)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = qkv()
    refused(r"q has shape \(91, 64\), expected \(tokens, heads, head dim\)", q.flatten(1), k, v)
    refused(r"q has shape \(90, 4, 16\), expected \(91, 4, 16\)", q[:90], k, v)
    refused(r"k has shape \(90, 2, 16\), expected \(91, 2, 16\)", q, k[:90], v)
    refused(r"v has shape \(91, 1, 16\), expected \(91, 2, 16\)", q, k, v[:, :1])
    refused(r"q has shape \(91, 4, 8\), expected \(91, 4, 16\)", q[..., :8], k, v)
    refused("q has 3 heads and k 2, expected a multiple", q[:, :3], k, v)
    wide = [torch.zeros(91, 2, 136)] * 3
    refused("head dim is 136, expected 8 to 128", *wide)
    refused("head dim is 20, expected a multiple of 8", *(x[..., :20] for x in wide))
    refused("head dim is 24, the plan is for head dims such as 32", *(x[..., :24] for x in wide))


def test_types_and_devices_that_do_not_fit_are_refused():
    q, k, v = qkv()
    refused(
        "q has dtype torch.float64, expected torch.bfloat16 or torch.float16 or", q.double(), k.double(), v.double()
    )
    refused("v has dtype torch.float32, expected torch.bfloat16", q, k, v.float())
    refused("v is on meta, the first argument on cpu", q, k, v.to("meta"))
    refused("plan is on meta, the first argument on cpu", q, k, v, PLAN.to("meta"))
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        refused(f"scale is {scale}, expected a positive finite number", q, k, v, PLAN, scale)
    with pytest.raises(
        ValueError, match=r"out_dtype is torch.float16, expected torch.bfloat16 \(as q\) or torch.float32"
    ):
        triton_attention_lse(q, k, v, PLAN, out_dtype=torch.float16)


def test_layouts_that_kernels_cannot_read_are_refused():
    q, k, v = qkv()
    heads_first = torch.zeros(4, 91, 16, dtype=torch.bfloat16).transpose(0, 1)
    refused("q has stride 1456 along axis 1, expected 16", heads_first, k, v)
    refused("k has stride 2 along axis 2, expected 1", q, torch.zeros(91, 16, 2, dtype=q.dtype).transpose(1, 2), v)
    refused("v has stride 0 between rows, expected at least 32", q, k, v[:1].expand_as(v))
    odd = torch.zeros(91, 33, dtype=torch.bfloat16)
    refused("k has 66 bytes from row to row, expected a multiple of 16", q, odd[:, :32].unflatten(1, (2, 16)), v)
    late = torch.zeros(91 * 64 + 1, dtype=torch.bfloat16)[1:].view(91, 4, 16)
    refused("q starts 2 bytes into its storage, expected a multiple of 16", late, k, v)


def test_offsets_beyond_int32_are_refused():
    q, k, v = qkv("meta")
    plan = PLAN.to("meta")
    spread = torch.empty(1, dtype=torch.bfloat16, device="meta").as_strided(k.shape, (2**25, 16, 1))
    refused("k reaches element offset 3019898911, expected less than 2147483648", q, spread, v, plan)


def test_compiled_kernels_refuse_cpu_tensors():
    pytest.importorskip("triton")
    refused("Triton kernels run on cuda, the arguments are on cpu", *qkv())


def test_meta_tensors_get_the_shapes_of_outputs_and_gradients():
    q, k, v = (x.requires_grad_() for x in qkv("meta"))
    out, lse = triton_attention_lse(q, k, v, PLAN.to("meta"), out_dtype=torch.float32)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float32, "meta")
    assert (lse.shape, lse.dtype) == ((4, 91), torch.float32)
    grads = torch.autograd.grad(out.sum() + lse.sum(), [q, k, v])
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


def test_flops_are_those_of_the_visible_pairs():
    q, k, v = (x.requires_grad_() for x in qkv("meta"))
    with FlopCounterMode(display=False) as counter:
        triton_attention(q, k, v, PLAN.to("meta")).sum().backward()
    assert counter.get_total_flops() == (4 + 10) * PLAN.visible * 4 * 16


def test_every_architecture_has_all_kernels_and_others_are_refused():
    for minor, arch, _ in TABLE:
        for head_dim in (64, 72, 80, 96, 128):
            configs = configs_for(f"{minor}.1", arch, torch.bfloat16, head_dim)
            assert configs.descriptors == (arch >= 90 and head_dim in (64, 128))
            assert Configs.of(configs.numbers()) == configs
            assert not configs_for(f"{minor}.1", arch, torch.float32, head_dim).descriptors
    with pytest.raises(
        ValueError, match=r"no attention kernels for Triton 3\.5 on sm_90, expected Triton 3\.6 on sm_100"
    ):
        configs_for("3.5.0", 90, torch.bfloat16, 128)
    with pytest.raises(ValueError, match=r"no attention kernels for Triton 3\.7 on sm_75"):
        configs_for("3.7.1", 75, torch.bfloat16, 128)


def test_planning_needs_no_triton():
    program = """
import sys
sys.modules["triton"] = None  # importing it now fails
import numpy as np
from megabagel_kernels.attention.configs import INTERPRETER
from megabagel_kernels.attention.mask import AttentionRanges
from megabagel_kernels.attention.triton import plan_triton
one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
print(plan_triton(AttentionRanges(zero, zero, one, zero, zero), INTERPRETER).visible)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
