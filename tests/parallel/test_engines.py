"""Which attention engine and which kernels a config gets, and what is said of them."""

import logging
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from megabagel.config.schema import Config, VitConfig
from megabagel.errors import UserError
from tests.support.grid_run import base_config


def config(name: str) -> Config:
    return replace(base_config(), parallel=replace(base_config().parallel, attention=name))


@pytest.mark.parametrize(
    ("asked", "engine", "why"),
    [("auto", "host", "this is a CPU"), ("host", "host", "asked for"), ("flex", "flex", "asked for")],
)
def test_choice_is_logged(caplog: pytest.LogCaptureFixture, asked: str, engine: str, why: str) -> None:
    from megabagel.parallel.attention import choose_attention

    with caplog.at_level(logging.INFO):
        found = choose_attention(config(asked))
    assert (found.name, found.has_backward) == (engine, engine == "host")
    assert caplog.messages == [f"attention engine: {engine} ({why})"]


def test_kernels_need_a_gpu_or_the_interpreter() -> None:
    from megabagel.parallel.attention import choose_attention

    lacking = "there is no GPU" if find_spec("triton") else "Triton is not installed"
    with pytest.raises(UserError, match=rf"parallel\.attention=triton: {lacking}.*Or use auto"):
        choose_attention(config("triton"))


@pytest.mark.parametrize(
    ("changes", "engine", "why"),
    [
        ({}, "triton", "kernels for this GPU"),
        (
            {"head_dim": 136},
            "flex",
            "the model (model.head_dim, else hidden / heads) has head dim 136",
        ),
        ({"head_dim": 12}, "flex", "head dim 12, the kernels take multiples of 8 from 8 to 128"),
        (
            {"vit": VitConfig(hidden=40, heads=2)},
            "flex",
            "ViT (model.vit.hidden / model.vit.heads) has head dim 20",
        ),
        ({"vit": VitConfig(hidden=40, heads=2), "visual_und": False}, "triton", "kernels for this GPU"),
    ],
)
def test_heads_that_the_kernels_cannot_run_go_to_another_engine(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], engine: str, why: str
) -> None:
    from megabagel_kernels.attention import engines

    from megabagel.parallel import attention as module

    monkeypatch.setattr("megabagel.parallel.attention.current_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(engines, "why_unavailable_here", lambda *_: "")
    monkeypatch.setattr(engines, "configs_here", lambda *_: None)

    def asked(name: str) -> Config:
        return replace(config(name), model=replace(config(name).model, **changes))

    with caplog.at_level(logging.INFO):
        assert module.choose_attention(asked("auto")).name == engine
    assert caplog.messages[0].startswith(f"attention engine: {engine} (") and why in caplog.messages[0]
    if engine != "triton":
        with pytest.raises(UserError, match=r"parallel\.attention=triton: .* head dim \d+, the kernels.*Or use auto"):
            module.choose_attention(asked("triton"))


def pretend(patch: pytest.MonkeyPatch, *, installed: bool, capability: tuple[int, int] | None) -> None:
    """A machine with or without FlashAttention-4 and a GPU of some compute capability."""
    from megabagel_kernels.attention import flex

    patch.setattr(flex, "find_spec", lambda name: object() if installed else None)
    patch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    patch.setattr(torch.cuda, "get_device_capability", lambda: capability)


@pytest.mark.parametrize(
    ("installed", "capability", "precision", "reason"),
    [
        (False, (9, 0), "bf16", r"not installed: pip install --pre flash-attn-4"),
        (True, None, "bf16", "there is no GPU"),
        (True, (8, 0), "bf16", r"compute capability 8\.0, FlashAttention-4 needs 9, 10 or 11"),
        (True, (9, 0), "fp32", "computes in bf16 or fp16, the model in float32"),
    ],
)
def test_fa4_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, installed: bool, capability: Any, precision: str, reason: str
) -> None:
    from megabagel.parallel.attention import choose_attention

    asked = config("fa4")
    pretend(monkeypatch, installed=installed, capability=capability)
    monkeypatch.setattr("megabagel.parallel.attention.current_device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match=rf"parallel\.attention=fa4: .*{reason}.*Or use auto"):
        choose_attention(replace(asked, train=replace(asked.train, precision=precision)))


@pytest.mark.parametrize(("capability", "rows"), [((9, 0), 128), ((10, 0), 256)])
def test_fa4_is_flex_with_another_backend(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capability: tuple[int, int], rows: int
) -> None:
    """The same mask in blocks as high as the GPU wants them, and torch is told which kernel to take."""
    from megabagel_kernels.attention import flex

    from megabagel.parallel.attention import choose_attention
    from tests.kernels.attention.packs import ranges_of

    pretend(monkeypatch, installed=True, capability=capability)
    monkeypatch.setattr("megabagel.parallel.attention.current_device", lambda: torch.device("cpu"))
    asked = config("fa4")
    with caplog.at_level(logging.INFO):
        engine = choose_attention(replace(asked, train=replace(asked.train, precision="bf16")))
    assert (engine.name, engine.has_backward, caplog.messages) == ("fa4", True, ["attention engine: fa4 (asked for)"])
    plan = engine.plan(ranges_of([[]]).padded(300), 16)
    assert plan.block == (rows, 128) and plan.mask.kv_num_blocks.shape == (1, 1, -(-300 // rows))
    told = []
    monkeypatch.setattr(flex, "_kernel", lambda _: lambda q, *_, **options: told.append(options) or q)
    x = torch.zeros(300, 2, 16)
    engine.run(x, x, x, plan)
    flex.flex_attention_packed(x, x, x, plan)
    assert [options["kernel_options"] for options in told] == [{"BACKEND": "FLASH"}, None]
    assert all(options["block_mask"] is plan.mask for options in told)


def test_blocks_of_fa4_hold_the_same_mask() -> None:
    """Plans of both heights, evaluated pair by pair from their lists and their mask."""
    from megabagel_kernels.attention.flex import plan_flex
    from megabagel_kernels.attention.mask import dense_mask

    from tests.support.grid_run import packs

    pack = packs(base_config(), 0)[0]
    codes = pack.codes.padded(-pack.tokens % 256 + 256)
    for rows in (128, 256):
        plan = plan_flex(codes, rows)
        counts, numbers, full_counts, full_numbers = (x[0, 0] for x in plan.lists)
        seen = torch.zeros(codes.queries, codes.keys, dtype=torch.bool)
        query, key = torch.arange(codes.queries)[:, None], torch.arange(codes.keys)[None]
        allowed = plan.mask.mask_mod(*[torch.tensor(0)] * 2, query, key)
        for block in range(len(counts)):
            here = slice(block * rows, (block + 1) * rows)
            for number in numbers[block, : counts[block]].tolist():
                cols = slice(number * 128, (number + 1) * 128)
                seen[here, cols] = allowed[here, cols]
            for number in full_numbers[block, : full_counts[block]].tolist():
                seen[here, number * 128 : (number + 1) * 128] = True
        assert torch.equal(seen, torch.from_numpy(dense_mask(codes)))


def kernels(name: str) -> Config:
    return replace(base_config(), parallel=replace(base_config().parallel, kernels=name))


@pytest.mark.parametrize(("asked", "why"), [("auto", "this is a CPU"), ("torch", "asked for")])
def test_choice_of_kernels_is_logged(caplog: pytest.LogCaptureFixture, asked: str, why: str) -> None:
    from megabagel.model.kernels import TORCH
    from megabagel.parallel.kernels import choose_kernels

    with caplog.at_level(logging.INFO):
        assert choose_kernels(kernels(asked)) is TORCH
    assert caplog.messages == [f"kernels between the linears: torch ({why})"]


def test_triton_kernels_need_a_gpu_or_the_interpreter() -> None:
    from megabagel.parallel.kernels import choose_kernels

    lacking = "there is no GPU" if find_spec("triton") else "Triton is not installed"
    with pytest.raises(UserError, match=rf"parallel\.kernels=triton: {lacking}.*Or use auto"):
        choose_kernels(kernels("triton"))


@pytest.mark.parametrize(("lacking", "engine", "why"), [("", "triton", "kernels for this GPU"), ("no", "torch", "no")])
def test_auto_on_a_gpu_takes_kernels_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: str, engine: str, why: str
) -> None:
    from megabagel.model.kernels import TORCH
    from megabagel.parallel import kernels as module

    monkeypatch.setattr("megabagel.parallel.kernels.current_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(module, "why_unavailable_here", lambda *_: lacking)
    monkeypatch.setattr(module, "triton_kernels", lambda: replace(TORCH, name="triton"))
    with caplog.at_level(logging.INFO):
        assert module.choose_kernels(kernels("auto")).name == engine
    assert caplog.messages == [f"kernels between the linears: {engine} ({why})"]
