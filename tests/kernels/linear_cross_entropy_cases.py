"""Checks of the linear cross-entropy that hold for each of its engines. Letters as in the module."""

import threading
from collections.abc import Callable
from functools import partial

import torch
from megabagel_kernels import reference
from megabagel_kernels.linear_cross_entropy import VocabShard, linear_cross_entropy
from torch import Tensor

from tests.kernels.triton.exactness import assert_exact

WIDTH = 40
SIZES = [(0, 30, 8), (1, 301, 64), (17, 301, 301), (17, 130, 65), (33, 257, 8192)]
"""Rows, words, words of a slice."""


def inputs(rows: int, words: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights, labels; the first and the last word are among the labels."""
    draw = torch.Generator().manual_seed(rows + words)
    hidden, weight = torch.randn(rows, WIDTH, generator=draw), 0.3 * torch.randn(words, WIDTH, generator=draw)
    label = torch.randint(words, (rows,), generator=draw)
    label[:2] = torch.tensor([words - 1, 0])[:rows]
    return hidden.to(dtype), weight.to(dtype), label


def check_against_reference(engine: str, rows: int, words: int, slice_words: int, dtype: torch.dtype) -> None:
    """Losses and both gradients against all logits in fp64."""
    hidden_KI, weight_VI, label_K = inputs(rows, words, dtype)
    label_K[3::7] = -100
    sliced = partial(linear_cross_entropy, engine=engine, slice_words=slice_words)
    assert_exact(sliced, reference.linear_cross_entropy, [hidden_KI, weight_VI], label_K)


def check_ignored_rows(engine: str) -> None:
    """An ignored row has no loss and leaves no gradient, also where the number for it is a word."""
    hidden_KI, weight_VI, label_K = inputs(9, 50)
    hidden_KI.requires_grad_(), weight_VI.requires_grad_()
    keep = label_K != 0
    assert not keep.all()
    run = partial(linear_cross_entropy, engine=engine, slice_words=16)
    loss_K = run(hidden_KI, weight_VI, label_K, ignore=0)
    assert torch.equal(loss_K == 0, ~keep)
    upstream = torch.linspace(-1, 1, 9)
    found = torch.autograd.grad(loss_K, (hidden_KI, weight_VI), upstream)
    alone = torch.autograd.grad(run(hidden_KI[keep], weight_VI, label_K[keep]), (hidden_KI, weight_VI), upstream[keep])
    assert not found[0][~keep].any()
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def check_shards(engine: str, shards: int) -> None:
    """Losses of uneven shards equal those of the whole; gradients of hidden states add up, of weights stand in line."""
    hidden_KI, weight_VI, label_K = inputs(13, 90)
    label_K[4] = -100
    upstream = torch.linspace(0.5, 2, 13)
    leaves = (hidden_KI.requires_grad_(), weight_VI.requires_grad_())
    whole = reference.linear_cross_entropy(*leaves, label_K)
    dhidden, dweight = torch.autograd.grad(whole, leaves, upstream)

    parts = weight_VI.detach().split([20, 45, 25] if shards == 3 else [50, 40])
    firsts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    group = Group(shards)

    def on(rank: int) -> list[Tensor]:
        shard = VocabShard(
            firsts[rank], partial(group.reduce, rank, torch.amax), partial(group.reduce, rank, torch.sum)
        )
        own = (hidden_KI.detach().requires_grad_(), parts[rank].clone().requires_grad_())
        loss_K = linear_cross_entropy(*own, label_K, shard=shard, engine=engine, slice_words=16)
        return [loss_K, *torch.autograd.grad(loss_K, own, upstream)]

    results = group.run(on)
    assert group.meetings == 2 * shards
    for loss_K, _, _ in results:
        torch.testing.assert_close(loss_K, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(result[1] for result in results), dhidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), dweight, rtol=1e-6, atol=1e-6)


class Group:
    """Ranks as threads that exchange tensors and else take turns, since Triton's interpreter serves one at a time."""

    def __init__(self, size: int) -> None:
        self.size, self.meetings = size, 0
        self.given: list[Tensor] = [torch.empty(0)] * size
        self.barrier, self.turn = threading.Barrier(size, timeout=60), threading.Lock()

    def reduce(self, rank: int, function: Callable[..., Tensor], x: Tensor) -> Tensor:
        self.given[rank] = x
        self._wait()
        result = function(torch.stack(self.given), 0)
        self._wait()
        self.meetings += 1
        return result

    def _wait(self) -> None:
        self.turn.release()
        self.barrier.wait()
        self.turn.acquire()

    def run(self, function: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        results: list[list[Tensor]] = [[] for _ in range(self.size)]

        def work(rank: int) -> None:
            with self.turn:
                results[rank] = function(rank)

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
