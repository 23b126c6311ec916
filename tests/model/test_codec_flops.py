"""The FLOP count of the codec against what torch counts when it runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megabagel.config.schema import VaeConfig
from megabagel.model.vae_flux import Autoencoder
from megabagel.sequence.flops import vae_flops


@pytest.mark.parametrize("multipliers", [(1, 2, 4, 4), (1, 1, 2), (1, 3)])
def test_flux_encoder(multipliers: tuple[int, ...]) -> None:
    config = VaeConfig(codec="flux", width=32, width_multipliers=multipliers, res_blocks=2)
    encoder = Autoencoder(config).encoder
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(torch.zeros(1, 3, 32, 48))
    assert vae_flops(config, 32 * 48, (32 * 48) ** 2) == counter.get_total_flops()
