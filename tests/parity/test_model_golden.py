"""The model on one device against the official code in float32: every layer, both losses, every gradient.

`python -m tests.parity.test_model_golden` prints the worst error of every quantity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from megabagel_kernels.attention.mask import dense_mask
from torch import Tensor, nn

from megabagel.model.bagel import Bagel
from megabagel.model.positions import sincos_table
from megabagel.sequence.sample import LATENT, TEXT, VIT
from tests.parity.golden import FOLDER, Case, build_model, load_case, official_gradients, official_names, stage_inputs

CASES = (
    "train_01_text_only",
    "train_02_t2i",
    "train_03_vlm",
    "train_04_edit",
    "train_05_interleave3",
    "train_06_video_groups",
)

GATES = {"ce": 2e-5, "reduced": 5e-6, "gradient": 2e-5}
"""Largest error by the first word of a quantity: absolute for losses, relative L2 for gradients."""
HIDDEN = 5e-6
"""Largest relative L2 error of everything else."""
NOT_HIDDEN = {"ce", "mse", "t", "attn_allowed"}
"""Expectations that are no hidden states."""

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no official numbers at {FOLDER}; MEGABAGEL_PARITY_DIR names their folder"
)
case_by_case = pytest.mark.parametrize("name", CASES)
load = cache(load_case)


@case_by_case
def test_sequence_plan_is_the_official_batch(name: str) -> None:
    case = load(name)
    batch, pack = case.batch, case.pack
    assert pack.tokens == int(batch["sequence_length"])
    assert pack.position_S.tolist() == batch["packed_position_ids"].tolist()
    streams = {
        "packed_text_indexes": pack.kind_S == TEXT,
        "packed_vit_token_indexes": pack.kind_S == VIT,
        "packed_vae_token_indexes": pack.kind_S == LATENT,
        "ce_loss_indexes": pack.ce_S,
        "mse_loss_indexes": pack.noised_S,
    }
    for stream, is_in_S in streams.items():
        assert np.flatnonzero(is_in_S).tolist() == batch.get(stream, torch.zeros(0)).tolist(), stream
    assert np.array_equal(dense_mask(pack.codes), case.expect["attn_allowed"].bool().numpy())


@case_by_case
def test_labels_are_the_words_that_follow(name: str) -> None:
    case = load(name)
    follows_K = case.batch["packed_text_ids"][case.pack.fill_S[case.pack.ce_S] + 1]
    assert follows_K.tolist() == case.batch.get("packed_label_ids", torch.zeros(0)).tolist()


@case_by_case
def test_grid_ids_and_position_tables(name: str) -> None:
    case, inputs = load(name), stage_inputs(load(name))
    hidden, batch = case.config.hidden, case.batch
    if inputs.vit is not None:
        assert inputs.vit.grid.tolist() == batch["packed_vit_position_ids"].tolist()
    if case.config.visual_gen:
        ids_S1 = case.in_sequence(inputs.word_U[:, None] * 0, inputs.latents.grid_g[:, None])
        assert ids_S1[case.pack.kind_S == LATENT, 0].tolist() == batch["packed_latent_position_ids"].tolist()
    for table, grid in (("vit", case.config.vit.grid), ("latent", case.config.latent_grid)):
        stored = case.weights[f"{table}_pos_embed.pos_embed"]
        torch.testing.assert_close(sincos_table(hidden, grid), stored, rtol=0, atol=6e-8)


@case_by_case
def test_every_weight_is_used_once(name: str) -> None:
    case = load(name)
    used = [theirs for ours, _ in build_model(case).named_parameters() for theirs in official_names(ours)]
    branches = {"vit_model": case.config.visual_und, "connector": case.config.visual_und}
    branches |= dict.fromkeys(("time_embedder", "vae2llm", "llm2vae"), case.config.visual_gen)
    branches |= dict.fromkeys(("vit_pos_embed", "latent_pos_embed"), False)  # frozen, computed
    assert sorted(used) == sorted(theirs for theirs in case.weights if branches.get(theirs.split(".")[0], True))


@case_by_case
def test_numbers_agree(name: str) -> None:
    found = errors(name)
    assert {quantity: error for quantity, error in found.items() if not error <= gate(quantity)} == {}


@case_by_case
def test_gradients_are_zero_where_nothing_is_learnt(name: str) -> None:
    """Without rows or without loss, an expert or a head learns nothing."""
    about, gradients = load(name).about, run(name).gradients
    idle = gradients.keys() & {*about["grads_none"], *about["grads_exactly_zero"]}
    assert [theirs for theirs in idle if gradients[theirs].any()] == []


@case_by_case
def test_every_parameter_has_a_gradient(name: str) -> None:
    """Also an idle one: ranks that reduce gradients wait for each other."""
    assert run(name).without_gradient == []


@dataclass(frozen=True)
class Run:
    """One forward and backward: S tokens, H hidden width, L latent tokens, C numbers of each, K rows with loss."""

    hidden: dict[str, Tensor]
    """[S, H] by official name, and the features of the tower."""
    t_L: Tensor
    ce_K: Tensor
    squared_error_KC: Tensor
    losses: dict[str, float]
    gradients: dict[str, Tensor]
    """By official name."""
    without_gradient: list[str]
    """Our parameters that took no part in backward."""


@cache
def run(name: str) -> Run:
    """The case through our model."""
    case = load(name)
    model, inputs = build_model(case), stage_inputs(case)
    hidden = watch(model, case)
    outputs = model(inputs)
    hidden["last_hidden_state"] = case.in_sequence(hidden.pop("und"), hidden.pop("gen"))
    ce = outputs.ce_K.sum() / max(case.about["n_ce_tokens"], 1)
    mse = outputs.mse_g.sum() / max(case.about["n_mse_tokens"], 1)
    loss = case.about["loss"]["ce_weight"] * ce + case.about["loss"]["mse_weight"] * mse
    loss.backward()
    return Run(
        hidden,
        t_L=on_latents(case, inputs.latents.time_I[inputs.latents.image_g, None])[:, 0],
        ce_K=outputs.ce_K.detach(),
        squared_error_KC=on_latents(
            case, (outputs.velocity_gC - inputs.latents.target_gC).square().detach(), noised=True
        ),
        losses={"ce": ce.item(), "mse": mse.item(), "loss": loss.item()},
        gradients=dict(official_gradients(case, model)),
        without_gradient=[ours for ours, parameter in model.named_parameters() if parameter.grad is None],
    )


def watch(model: Bagel, case: Case) -> dict[str, Tensor]:
    """Fills with hidden states while the model runs."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, key: str, read: Callable[[Any], Tensor]) -> None:
        module.register_forward_hook(lambda _module, _inputs, result: seen.update({key: read(result).detach()}))

    keep(model.embed, "inputs_embeds", lambda hidden: case.in_sequence(hidden.und_uI, hidden.gen_gI))
    for index, layer in model.layers.items():
        keep(layer, f"layer{index}", lambda both: case.in_sequence(*both))
    for expert in ("und", "gen"):
        keep(getattr(model.heads.norm, expert), expert, lambda x: x)
    if case.config.visual_und:
        keep(model.embed.vit, "vit_out", lambda features: features)
    return seen


def on_latents(case: Case, x_gC: Tensor, noised: bool = False) -> Tensor:
    """Gen rows of our layout as latent tokens in sequence order, all or the noised ones alone."""
    und_UC = x_gC.new_zeros(case.layout.borders[0], x_gC.shape[1])
    chosen_S = case.pack.noised_S if noised else case.pack.kind_S == LATENT
    return case.in_sequence(und_UC, x_gC)[chosen_S]


def gate(quantity: str) -> float:
    """Largest error allowed."""
    return next((limit for key, limit in GATES.items() if quantity.startswith(key)), HIDDEN)


def errors(name: str) -> dict[str, float]:
    """Error of every quantity that the case holds."""
    expect, about, found = load(name).expect, load(name).about, run(name)
    result = {key: relative(found.hidden[key], expect[key]) for key in sorted(expect.keys() - NOT_HIDDEN)}
    for index, norm in enumerate(about["layer_output_norms"]):
        result[f"layer norm of {index}"] = abs(float(found.hidden[f"layer{index}"].double().norm()) / norm - 1)
    if "ce" in expect:
        result["ce per token"] = float((found.ce_K - expect["ce"]).abs().max())
    if "mse" in expect:
        result["t"] = relative(found.t_L, expect["t"])
        result["mse per element"] = relative(found.squared_error_KC, expect["mse"])
    for key, value in about["loss"]["f32_flex"].items():
        result[f"reduced {key}"] = abs(found.losses[key] - value)
    for key, gradient in load(name).grad.items():
        result[f"gradient of {key}"] = relative(found.gradients[key], gradient)
    for key, norm in about["grad_norms_f64"].items():
        if norm and key not in about["grads_roundoff_only"]:
            result[f"gradient norm of {key}"] = abs(float(found.gradients[key].double().norm()) / norm - 1)
    total = float(torch.stack([gradient.double().norm() for gradient in found.gradients.values()]).norm())
    return result | {"gradient norm, total": abs(total / about["grad_total_norm_f64"] - 1)}


def relative(x: Tensor, expected: Tensor) -> float:
    """L2 distance over L2 norm."""
    assert x.shape == expected.shape
    return float((x.double() - expected.double()).norm() / expected.double().norm())


if __name__ == "__main__":
    worst: dict[str, tuple[float, str]] = {}
    for name in CASES:
        for quantity, error in errors(name).items():
            kind = quantity.partition(" of ")[0]
            worst[kind] = max(worst.get(kind, (0.0, "")), (error, f"{name} {quantity}"))
    for kind, (error, where) in worst.items():
        print(f"{kind:22} {error:.1e} of {gate(kind):.0e} allowed  ({where})")
