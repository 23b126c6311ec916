"""Freeze sets: what learns, and that stopping the understanding stream is what the released code's detaches do."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.model.inputs import Hidden, LatentInputs, Rope, StageInputs
from megabagel.model.positions import rope_tables
from tests.support.grid_run import base_config

MODEL = replace(base_config().model, visual_und=False)
UND, GEN = 6, 5


def build(variant: str = "mot", freeze: tuple[str, ...] = ()) -> Bagel:
    torch.manual_seed(3)
    model = Bagel(replace(MODEL, variant=variant), SingleDevice(), freeze=freeze)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> StageInputs:
    """Und rows see gen rows and the other way round, so that gradients can flow both ways."""
    draw = torch.Generator().manual_seed(5)
    latents = LatentInputs(
        x_t_gZ=torch.randn(GEN, MODEL.latent_dim, generator=draw),
        target_gZ=torch.randn(GEN, MODEL.latent_dim, generator=draw),
        weight_g=torch.ones(GEN),
        grid_g=torch.arange(GEN),
        time_I=torch.tensor([0.3]),
        image_g=torch.zeros(GEN, dtype=torch.int64),
    )

    def attend(q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> Tensor:
        k_TNH, v_TNH = (x.repeat_interleave(q_TNH.shape[1] // x.shape[1], 1) for x in (k_TMH, v_TMH))
        weight_NTT = torch.einsum("tnh,snh->nts", q_TNH, k_TNH).div(MODEL.kv_channels**0.5).softmax(-1)
        return torch.einsum("nts,snh->tnh", weight_NTT, v_TNH)

    return StageInputs(
        attend=lambda layer: attend,
        rope=Rope(*rope_tables(torch.arange(UND + GEN), MODEL.kv_channels, MODEL.rope_base)),
        word_U=torch.arange(UND),
        is_word_U=torch.ones(UND, dtype=torch.bool),
        vit=None,
        latents=latents,
        ce_row_Q=torch.tensor([1, 4]),
        label_Q=torch.tensor([7, 9]),
        source_Q=torch.zeros(2, dtype=torch.int64),
        source_g=torch.zeros(GEN, dtype=torch.int64),
    )


def gradients(model: Bagel) -> dict[str, Tensor]:
    outputs = model(inputs())
    (outputs.ce_Q.sum() + outputs.mse_g.sum()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def stop(module: nn.Module, cut: Callable[[Any], Any] = lambda x: x.detach()) -> None:
    module.register_forward_hook(lambda _module, _inputs, result: cut(result))


def released(model: Bagel, inside: bool) -> Bagel:
    """The released code's `freeze_und`, detach by detach (docs/bagel.md#freezing); `inside` the layers or not."""
    stop(model.embed, lambda hidden: replace(hidden, und_uD=hidden.und_uD.detach()))
    stop(model.heads.norm, lambda both: (both[0].detach(), both[1]))
    for layer in model.layers.values() if inside else ():
        attention = layer.attention.und
        for module in (attention.qkv, attention.o, layer.mlp.und):
            stop(module)
        for norm in (attention.q_norm, attention.k_norm):  # detached after them; here they are one with the rotation
            norm.requires_grad_(False)
    return model


@pytest.mark.parametrize("variant", ["mot", "moe", "dense"])
def test_und_stops_where_the_released_code_stops(variant: str) -> None:
    expected = gradients(released(build(variant), inside=variant == "mot"))
    found = gradients(build(variant, ("und",)))
    for name, gradient in expected.items():
        if gradient.any():
            assert torch.equal(found[name], gradient), name
        else:
            assert name not in found or not found[name].any(), name
    assert expected["heads.lm_head.weight"].any() and expected["embed.vae2llm.weight"].any()
    assert "embed.tokens.weight" not in found
    assert ("layers.0.mlp.und.down.weight" in found) == (variant != "mot")
    assert set(found) < set(gradients(build(variant)))


def test_the_und_stream_would_learn_from_what_it_reads_of_gen_rows() -> None:
    """Otherwise the test above could not see a detach that is missing."""
    whole, cut = gradients(build()), gradients(build(freeze=("und",)))
    assert not torch.allclose(whole["embed.vae2llm.weight"], cut["embed.vae2llm.weight"], rtol=1e-2)


LLM = {"embed.tokens", "layers", "heads.norm", "heads.lm_head"}
LATENT = {"vae2llm", "time_embedder", "llm2vae"}
PARTS = ("embed.tokens", "vit", "connector", *sorted(LATENT), "heads.lm_head", "heads.norm", "layers")
"""The tower has layers of its own, so it is looked for before them."""


@pytest.mark.parametrize(
    ("freeze", "learns"),
    [
        ((), {*LLM, *LATENT, "vit", "connector"}),
        (("llm",), {*LATENT, "vit", "connector"}),
        (("vit",), {*LLM, *LATENT, "connector"}),
        (("llm", "vit", "latent"), {"connector"}),
        (("llm", "connector", "vit"), LATENT),
    ],
)
def test_sets(freeze: tuple[str, ...], learns: set[str]) -> None:
    model = Bagel(base_config().model, SingleDevice(), freeze=freeze)
    parts: dict[bool, set[str]] = {True: set(), False: set()}
    for name, parameter in model.named_parameters():
        parts[parameter.requires_grad].add(next(part for part in PARTS if part in name))
    assert parts[True] == learns
    assert not parts[True] & parts[False]


def test_a_later_stage_gets_no_gradient_for_und_rows_either() -> None:
    """The wire between pipeline stages needs a gradient as a whole."""
    model = Bagel(MODEL, SingleDevice(), range(2, 5), first=False, freeze=("und",))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    und_uD, gen_gD = (
        torch.randn(UND, MODEL.hidden, requires_grad=True),
        torch.randn(GEN, MODEL.hidden, requires_grad=True),
    )
    given = inputs()
    assert given.latents is not None
    outputs = model(given, Hidden(und_uD, gen_gD, given.latents.target_gZ, given.latents.weight_g))
    (outputs.ce_Q.sum() + outputs.mse_g.sum()).backward()
    assert und_uD.grad is None
    assert gen_gD.grad is not None and gen_gD.grad.any()
