"""Attention by Triton against the dense reference in fp64.

In Triton's interpreter; run by `tests/kernels/triton/test_in_interpreter.py`, in a process of its own.

Letters: T queries, S keys, N query heads, M key/value heads, H head dim.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from megabagel_kernels.attention.configs import INTERPRETER, Config, Configs, configs_for, configs_here
from megabagel_kernels.attention.mask import AttentionRanges
from megabagel_kernels.attention.merge import merge
from megabagel_kernels.attention.reference import attention_reference
from megabagel_kernels.attention.triton import TritonPlan, plan_triton, triton_attention, triton_attention_lse
from megabagel_kernels.attention.triton_ops import attention_backward_op, attention_op

from tests.kernels.attention.cases import (
    Case,
    by_plain_torch,
    by_reference,
    by_triton,
    errors,
    inputs_of,
    normal,
    random_case,
)
from tests.kernels.attention.packs import Segment, ranges_of
from tests.kernels.triton import bf16_shim

bf16_shim.install()
torch.set_num_threads(1)

SMALL = Config(16, 16, 4, 1)
POINTERS = Configs(SMALL, Config(16, 32, 4, 1), Config(32, 16, 4, 1), descriptors=False, split_below=0)
DESCRIPTORS = Configs(SMALL, Config(16, 32, 4, 1), Config(32, 16, 4, 1), descriptors=True, split_below=10**6)
PACK = [
    [Segment(20, "causal"), Segment(18, "noise")],
    [Segment(17, "full"), Segment(9, "causal"), Segment(16, "noise", 1)],
]


def seeds(first: int, count: int, sampled: int) -> list[Any]:
    """Seeds of random cases, of which CI runs the first `sampled`."""
    return [pytest.param(first + i, marks=[pytest.mark.thorough] * (i >= sampled)) for i in range(count)]


def check_fp32(case: Case) -> None:
    found = errors(by_triton(case, torch.float32), by_reference(case, torch.float32))
    assert max(found.values()) < 1e-6, (case, found)


def check_half(case: Case, dtype: torch.dtype) -> None:
    """At most twice the error of plain torch in the same dtype, which may be lucky: one rounding is always allowed."""
    expected = by_reference(case, dtype)
    found, plain = errors(by_triton(case, dtype), expected), errors(by_plain_torch(case, dtype), expected)
    assert found["lse"] < 1e-6, (case, found)
    rounding = torch.finfo(dtype).eps / 2
    for name in ("out", "dq", "dk", "dv"):
        assert found[name] < 2 * max(plain[name], rounding), (case, name, found, plain)


@pytest.mark.parametrize("configs", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("heads", [(4, 2), pytest.param((2, 2), marks=pytest.mark.thorough), (7, 1)])
def test_a_small_pack(configs: Configs, heads: tuple[int, int]):
    check_fp32(Case(ranges_of(PACK).padded(5), configs, heads, 32, seed=0))


def test_queries_of_which_some_see_no_key_of_the_set():
    ranges = ranges_of(PACK)
    part = ranges.take(np.arange(10, ranges.queries), np.r_[0:8, 45:56])
    check_fp32(Case(part, POINTERS, (2, 1), 16, seed=1))
    check_fp32(Case(part, DESCRIPTORS, (2, 1), 16, seed=1))


@pytest.mark.parametrize("seed", seeds(0, 22, sampled=8))
def test_random_packings_in_fp32(seed: int):
    check_fp32(random_case(seed))


@pytest.mark.parametrize("seed", seeds(100, 12, sampled=4))
def test_random_packings_in_bf16(seed: int):
    check_half(random_case(seed), torch.bfloat16)


@pytest.mark.parametrize("seed", seeds(200, 3, sampled=1))
def test_random_packings_in_fp16(seed: int):
    check_half(random_case(seed), torch.float16)


@pytest.mark.parametrize(
    ("arch", "head_dim"),
    [pytest.param(80, 128, marks=pytest.mark.thorough), (90, 128), pytest.param(90, 72, marks=pytest.mark.thorough)],
)
def test_shipped_configurations(arch: int, head_dim: int):
    ranges = ranges_of([[Segment(30, "causal"), Segment(140, "noise")], [Segment(60, "full"), Segment(70, "noise", 1)]])
    configs = configs_for("3.7.1", arch, torch.bfloat16, head_dim)
    check_half(Case(ranges, configs, (7, 1), head_dim, seed=0), torch.bfloat16)


def test_the_interpreter_has_a_configuration():
    assert configs_here(torch.bfloat16, 80) == INTERPRETER
    check_fp32(Case(ranges_of([[Segment(100, "full"), Segment(9, "causal")]]), INTERPRETER, (4, 2), 80, seed=0))


@pytest.mark.parametrize("configs", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
def test_no_queries_no_keys_and_nothing_to_see(configs: Configs):
    ranges = ranges_of([[Segment(5, "full")]])
    nothing = np.arange(0)
    for case in (
        Case(ranges.take(queries=nothing), configs, (2, 1), 16, 0),
        Case(ranges.take(keys=nothing), configs, (2, 1), 16, 0),
        Case(ranges.take(queries=nothing, keys=nothing).padded(20), configs, (2, 1), 16, 0),
    ):
        check_fp32(case)
        assert all(not bool(x.isnan().any()) for x in by_triton(case, torch.float32))


def test_the_same_inputs_give_the_same_bits():
    case = Case(ranges_of(PACK), DESCRIPTORS, (4, 1), 32, seed=3)
    first, second = by_triton(case, torch.bfloat16), by_triton(case, torch.bfloat16)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.thorough
def test_summing_the_heads_of_a_group_apart_rounds_only_once():
    together = Case(ranges_of(PACK), POINTERS, (7, 1), 32, seed=4)
    apart = replace(together, configs=replace(POINTERS, split_below=10**6))
    expected = by_reference(together, torch.bfloat16)
    first, second = (errors(by_triton(case, torch.bfloat16), expected) for case in (together, apart))
    assert first["dk"] == pytest.approx(second["dk"], rel=0.01)
    assert first["dv"] == pytest.approx(second["dv"], rel=0.01)


def parts_of(ranges: AttentionRanges, count: int) -> list[np.ndarray]:
    """Keys dealt in chunks of 8 to `count` ranks, each rank's in its own order."""
    chunks = np.array_split(np.arange(ranges.keys), -(-ranges.keys // 8))
    return [np.concatenate(chunks[rank::count][::-1]) for rank in range(count)]


def test_ring_of_key_sets_merged_by_lse():
    ranges = ranges_of(PACK)
    case = Case(ranges, POINTERS, (4, 2), 32, seed=5)
    q, k, v = inputs_of(case, torch.float32)
    grad = normal(case, 2, ranges.queries, 4, 32).float()
    outs, lses = [], []
    for keys in parts_of(ranges, 3):
        plan = plan_triton(ranges.take(keys=keys), POINTERS)
        index = torch.from_numpy(keys)
        out, lse = triton_attention_lse(q, k[index], v[index], plan, out_dtype=torch.float32)
        outs.append(out)
        lses.append(lse)
    out, lse = merge(outs, lses)
    found = [out, lse, *torch.autograd.grad(out, [q, k, v], grad)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = [*attention_reference(*exact, ranges)]
    expected += torch.autograd.grad(expected[0], exact, grad.double())
    assert max(errors([x.detach() for x in found], [x.detach() for x in expected]).values()) < 1e-6


def test_backward_over_some_keys_from_results_over_all_keys():
    ranges = ranges_of(PACK)
    case = Case(ranges, DESCRIPTORS, (4, 2), 32, seed=6)
    q, k, v = (x.detach() for x in inputs_of(case, torch.float32))
    grad = normal(case, 2, ranges.queries, 4, 32).float()
    plan = plan_triton(ranges, DESCRIPTORS)
    out, lse = triton_attention_lse(q, k, v, plan)

    def backward(plan: TritonPlan, keys: slice | torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors, numbers = list(plan.tensors), plan.configs.numbers()
        return attention_backward_op(
            grad, None, q, k[keys], v[keys], out, lse, tensors, numbers, plan.visible, 32**-0.5
        )

    dq, dk, dv = backward(plan, slice(None))
    dq_parts = torch.zeros_like(dq)
    for keys in parts_of(ranges, 2):
        index = torch.from_numpy(keys)
        part = backward(plan_triton(ranges.take(keys=keys), DESCRIPTORS), index)
        dq_parts += part[0]
        torch.testing.assert_close(part[1], dk[index], rtol=0, atol=1e-5)
        torch.testing.assert_close(part[2], dv[index], rtol=0, atol=1e-5)
    torch.testing.assert_close(dq_parts, dq, rtol=0, atol=1e-5)


def test_decoding_over_a_cache_gives_the_rows_of_the_whole():
    ranges = ranges_of([[Segment(30, "causal"), Segment(10, "full"), Segment(9, "causal")]])
    case = Case(ranges, POINTERS, (7, 1), 16, seed=7)
    q, k, v = inputs_of(case, torch.float32)
    whole = triton_attention(q, k, v, plan_triton(ranges, POINTERS))
    for row in (0, 29, 35, 48):
        last = ranges.take([row], np.arange(row + 1) if row > 40 else None)
        some = slice(0, last.keys)
        step = triton_attention(q[row : row + 1], k[some], v[some], plan_triton(last, POINTERS))
        torch.testing.assert_close(step[0], whole[row], rtol=0, atol=1e-6)


def test_gradients_reach_one_fused_projection():
    ranges = ranges_of([[Segment(12, "full"), Segment(7, "causal")]])
    plan = plan_triton(ranges, POINTERS)
    fused = torch.randn(19, 8 * 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    parts = [x.unflatten(1, (-1, 16)) for x in fused.split([4 * 16, 2 * 16, 2 * 16], dim=1)]
    (found,) = torch.autograd.grad(triton_attention(*parts, plan).square().sum(), fused)
    (expected,) = torch.autograd.grad(attention_reference(*parts, ranges)[0].square().sum(), fused)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_torch_accepts_the_operator():
    ranges = ranges_of([[Segment(9, "causal")]])
    plan = plan_triton(ranges, POINTERS)
    q, k, v = inputs_of(Case(ranges, POINTERS, (2, 1), 16, 0), torch.float32)
    arguments = (q, k, v, list(plan.tensors), POINTERS.numbers(), plan.visible, 0.25, torch.float32)
    torch.library.opcheck(attention_op, arguments)


def test_lse_alone_has_a_gradient():
    case = Case(ranges_of(PACK), POINTERS, (2, 1), 16, seed=9)
    q, k, v = inputs_of(case, torch.float32)
    lse = triton_attention_lse(q, k, v, plan_triton(case.ranges, POINTERS))[1]
    found = torch.autograd.grad(lse.sum(), [q, k], allow_unused=True)
    expected = torch.autograd.grad(attention_reference(q, k, v, case.ranges)[1].sum(), [q, k])
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
