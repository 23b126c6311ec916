"""Models that cannot fit are refused before anything is built; those that might are not."""

from dataclasses import replace

import pytest
import torch

from megabagel.config.schema import Config, ModelConfig, ParallelConfig
from megabagel.errors import UserError
from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.train.memory_check import check_memory, parameters

CPU = torch.device("cpu")


@pytest.mark.parametrize("variant", ["dense", "moe", "mot"])
def test_parameters_are_those_of_the_model_but_for_small_ones(variant: str) -> None:
    model = ModelConfig(variant=variant, layers=3)  # type: ignore[arg-type]
    with torch.device("meta"):
        built = Bagel(model, SingleDevice(), range(3), first=True, last=True)
    exact = sum(parameter.numel() for parameter in built.parameters())
    assert 0.8 * exact < parameters(model) < exact


@pytest.mark.parametrize(
    "change", [{"hidden": 2**20, "heads": 2**13}, {"ffn": 2**22, "layers": 4096}, {"head_dim": 4096, "heads": 2**20}]
)
def test_a_model_that_no_machine_holds_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError, match="GiB per rank in training"):
        check_memory(Config(model=replace(ModelConfig(), **change)), CPU, 1)


def test_what_is_spread_or_small_passes() -> None:
    check_memory(Config(), CPU, 1)
    large = replace(ModelConfig(), hidden=8192, heads=64, ffn=28672, layers=80)
    with pytest.raises(UserError, match="latent_grid"):
        check_memory(Config(model=replace(ModelConfig(), latent_grid=4096, hidden=2**18)), CPU, 1)
    check_memory(Config(model=large, parallel=ParallelConfig(tp=64, pp=80)), CPU, 1024)
