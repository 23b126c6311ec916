"""Norm and clipping of gradients: megatron-core's bits, without a host synchronization per shard."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.rank_pool import RankPool

SHAPES = ((3,), (64, 65), (1,), (1025,), (7, 3))


def shards(seed: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


class Reads(TorchDispatchMode):
    """Counts reads of a device value by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def compared(most: float) -> list[Any]:
    from megabagel.runtime import cpu_backend

    cpu_backend.install()
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32

    from megabagel.train.gradients import clip_gradients, gradient_norm

    rank, group = dist.get_rank(), dist.group.WORLD
    mine, theirs = (shards(rank) if rank else [] for _ in range(2))
    with Reads() as reads:
        norm = gradient_norm(mine, group, torch.device("cpu"))
        clip_gradients(mine, most, norm)
    expected = get_grad_norm_fp32(theirs, grad_stats_parallel_group=group)
    parameters = [torch.nn.Parameter(torch.zeros_like(shard)) for shard in theirs]
    for parameter, shard in zip(parameters, theirs, strict=True):
        parameter.grad = shard
    clip_grad_by_total_norm_fp32(parameters, max_norm=most, total_norm=expected)
    same = all(torch.equal(a, p.grad) for a, p in zip(mine, parameters, strict=True))
    return [norm, expected, same, reads.count]


@pytest.mark.parametrize("most", [1.0, 1e6])
def test_bits_of_megatron_core_with_one_read(ranks: RankPool, most: float) -> None:
    """On two ranks of which the first has no gradients, as a stage whose weights are all frozen."""
    for norm, expected, same, reads in ranks.run(2, compared, most):
        assert norm == expected > 60 and same
        assert reads == 1


def test_the_fused_adamw_counts_on_the_device_of_its_shards() -> None:
    from types import SimpleNamespace

    from megabagel.train.optimizer import Optimizer

    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    inner = torch.optim.AdamW([parameter])
    fake: Any = SimpleNamespace(inner=inner, shards=lambda: [parameter], _counts_per_shard=True)
    Optimizer._fuse(fake)
    Optimizer._allocate_moments(fake)
    assert inner.state[parameter]["step"].device.type == "meta" and inner.state[parameter]["exp_avg"].shape == (3,)
    assert inner.param_groups[0]["fused"] is True and not inner.param_groups[0]["foreach"]
