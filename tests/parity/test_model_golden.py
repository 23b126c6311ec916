"""The model as one plain module on one device, on torch alone, against the official code in float32.

`megabagel parity` compares every number (test_parity_command.py). Here autograd itself is looked at: which parameters
take part, and that the model needs none of megatron-core's layers, buffers and schedules.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabagel.checkpoint.hf.names import official_name
from megabagel.config.schema import Config, DataConfig, ParallelConfig, TrainConfig
from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.model.sharding import named_pieces
from megabagel.parity.case import Case, model_config, open_case
from megabagel.sequence.batch import BatchBuilder
from megabagel.sequence.rank_rows import RankPlace
from tests.support.parity_command import TRAIN
from tests.support.parity_files import stem
from tests.support.rank_pool import RankPool

NO_GROUP: Any = None


@dataclass(frozen=True)
class Found:
    """One forward and backward; names are the official ones."""

    case: Case
    loss: float
    used: list[str]
    """Weights that were loaded, one for each part of a parameter."""
    norms: dict[str, float | None]
    """Of gradients; None for a parameter that took no part."""


@pytest.fixture(scope="module", params=TRAIN)
def found(request: pytest.FixtureRequest, ranks: RankPool) -> Found:
    """In a worker, as what builds the inputs imports megatron-core."""
    return ranks.run(1, backward, request.param)[0]


def backward(name: str) -> Found:
    from megabagel.parallel.attention import HOST
    from megabagel.parallel.inputs import InputBuilder
    from megabagel.parallel.mesh import Axis, Mesh
    from megabagel.parity.packs import fixed_noise, official_batch, packed_batch

    case, alone = open_case(stem(name)), Axis(0, 1, NO_GROUP)
    mesh = Mesh(world=alone, tp=alone, pp=alone, cp=alone, dp=alone, tp_cp=alone, dp_cp=alone)
    config = _config(case)
    official = official_batch(case, config.model)
    batch = packed_batch(official, BatchBuilder(config, RankPlace(), HOST.plan))
    model = Bagel(config.model, SingleDevice())
    weights = load_file(case.path)
    with torch.no_grad():
        for piece, parameter in named_pieces(model):
            piece.view(parameter).copy_(weights[official_name(piece.name)])
    builder = InputBuilder(config, mesh, None, torch.device("cpu"))
    outputs = model(builder.build(batch, fixed_noise(official, config.model)))
    weight, pack = case.entry("loss"), official.pack
    ce = weight["ce_weight"] * outputs.ce_Q.sum() / max(pack.ce_tokens, 1)
    loss = ce + weight["mse_weight"] * outputs.mse_g.sum() / max(pack.mse_tokens, 1)
    loss.backward()
    norms = dict(_norms(model))
    return Found(case, loss.item(), [official_name(piece.name) for piece, _ in named_pieces(model)], norms)


def _config(case: Case) -> Config:
    return Config(
        model=model_config(case),
        train=TrainConfig(timestep_shift=case.config["timestep_shift"]),
        data=DataConfig(min_tokens=1, max_tokens=256),
        parallel=ParallelConfig(chunk=16),  # both experts have padding rows in every case
    )


def _norms(model: Bagel) -> Iterator[tuple[str, float | None]]:
    for piece, parameter in named_pieces(model):
        gradient = parameter.grad
        yield official_name(piece.name), None if gradient is None else float(piece.view(gradient).double().norm())


def test_loss_and_gradient_norms(found: Found) -> None:
    case = found.case
    assert found.loss == pytest.approx(case.entry("loss")["f32_flex"]["loss"], abs=5e-6)
    noise, total = case.entry("grads_roundoff_only"), case.entry("grad_total_norm_f64")
    norms = {name: case.entry("grad_norms_f64")[name] or 0.0 for name in found.norms if name not in noise}
    wrong = {
        name: (found.norms[name], norm)
        for name, norm in norms.items()
        if found.norms[name] != pytest.approx(norm, rel=2e-5, abs=1e-6 * total if norm else 0.0)
    }
    assert wrong == {}, "where nothing is learnt, gradients are exact zeros"


def test_every_parameter_has_a_gradient(found: Found) -> None:
    """Also an idle one: ranks that reduce gradients wait for each other."""
    assert [name for name, norm in found.norms.items() if norm is None] == []


def test_every_weight_is_used_once(found: Found) -> None:
    """But those of branches that are switched off, and the frozen tables, which are computed."""
    learnt = [name for name in found.case.weights if not name.endswith("pos_embed.pos_embed")]
    assert sorted(found.used) == sorted(learnt)
