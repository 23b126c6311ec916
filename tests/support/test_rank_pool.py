"""The worker pool that multi-rank tests stand on."""

import os
import time

import pytest

from tests.support.rank_pool import RankError, RankPool


def rank_sums(start: int) -> tuple[int, int, float]:
    """(rank, world size, sum over ranks of start + rank)."""
    import torch
    from torch import distributed

    value = torch.tensor(float(start + distributed.get_rank()))
    distributed.all_reduce(value)
    return distributed.get_rank(), distributed.get_world_size(), value.item()


def fail_on(rank: int) -> None:
    """One rank raises while the others wait for it."""
    from torch import distributed

    if distributed.get_rank() == rank:
        print("before the fall")
        raise ValueError("planted")
    distributed.barrier()


def hang_on(rank: int) -> None:
    """One rank sleeps while the others wait for it."""
    from torch import distributed

    if distributed.get_rank() == rank:
        time.sleep(600)
    distributed.barrier()


def die_on(rank: int) -> None:
    """One rank's process ends without a word."""
    from torch import distributed

    if distributed.get_rank() == rank:
        os._exit(7)
    distributed.barrier()


def megatron_grid(tp: int, pp: int) -> tuple[int, int, int]:
    """This rank's place in a megatron grid, which the pool has to take down again."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tp, pp)
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )


def process_id() -> int:
    """Who serves this rank."""
    return os.getpid()


def test_collectives_over_four_ranks(ranks: RankPool) -> None:
    assert ranks.run(4, rank_sums, 10) == [(rank, 4, 46.0) for rank in range(4)]


def test_world_sizes_in_turn_share_processes(ranks: RankPool) -> None:
    first = ranks.run(3, process_id)
    for size in (1, 3, 2):
        assert ranks.run(size, rank_sums, 0) == [(rank, size, sum(range(size))) for rank in range(size)]
        assert ranks.run(size, process_id) == first[:size]


def test_megatron_grids_in_turn(ranks: RankPool) -> None:
    assert ranks.run(4, megatron_grid, 2, 2) == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert ranks.run(4, megatron_grid, 2, 1) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]


def test_failing_rank_is_named_with_its_traceback_and_output(ranks: RankPool) -> None:
    with pytest.raises(
        RankError, match=r"rank 2 of 4 failed:[\s\S]*ValueError: planted[\s\S]*before the fall"
    ) as caught:
        ranks.run(4, fail_on, 2)
    assert "in fail_on" in str(caught.value)
    assert "printed by rank 2:\nbefore the fall" in str(caught.value)
    assert ranks.run(4, rank_sums, 1) == [(rank, 4, 10.0) for rank in range(4)]


def test_dead_rank_is_named(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 1 of 2 failed:\nthe process ended with exit code 7"):
        ranks.run(2, die_on, 1)


def test_hang_is_reported_with_every_stack(ranks: RankPool) -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"no answer from ranks \[0, 1, 2\] of 3") as caught:
        ranks.run(3, hang_on, 1, timeout=5)
    assert time.monotonic() - start < 30
    for rank in range(3):
        assert f"printed by rank {rank}:" in str(caught.value)
    assert str(caught.value).count("in hang_on") == 3
    assert ranks.run(3, rank_sums, 0) == [(rank, 3, 3.0) for rank in range(3)]
