"""Our config in megatron-core's words."""

import pytest
import torch

from tests.support.grid_run import base_config


@pytest.mark.parametrize("cuda", [False, True])
def test_gradients_of_embeddings_have_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """On a GPU those of torch's embedding do not; on a CPU they do."""
    from megabagel.parallel.megatron import megatron_config

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert megatron_config(base_config()).deterministic_mode is cuda
