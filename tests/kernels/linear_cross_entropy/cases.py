"""Inputs and checks of linear cross-entropy that serve each of its engines.

Letters: Q rows with cross-entropy, D width, V vocabulary.
"""

import threading
from collections.abc import Callable
from functools import partial

import torch
from megabagel_kernels.linear_cross_entropy import VocabShard, linear_cross_entropy, reference
from torch import Tensor

from tests.kernels.case import Case, Numbers
from tests.kernels.exactness import assert_exact

WIDTH = 40
SIZES = [(0, 30, 8), (1, 301, 64), (17, 301, 301), (17, 130, 65), (33, 257, 8192)]
"""Rows, vocabulary, tokens of a slice."""


def inputs(rows: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weights, labels; the first and the last token are among the labels."""
    draw = torch.Generator().manual_seed(rows + tokens)
    hidden, weight = torch.randn(rows, WIDTH, generator=draw), 0.3 * torch.randn(tokens, WIDTH, generator=draw)
    label = torch.randint(tokens, (rows,), generator=draw)
    label[:2] = torch.tensor([tokens - 1, 0])[:rows]
    return hidden.to(dtype), weight.to(dtype), label


def check_against_reference(engine: str, rows: int, tokens: int, slice_tokens: int, dtype: torch.dtype) -> None:
    """Losses and both gradients against all logits in fp64."""
    hidden_QD, weight_VD, label_Q = inputs(rows, tokens, dtype)
    label_Q[3::7] = -100
    sliced = partial(linear_cross_entropy, engine=engine, slice_tokens=slice_tokens)
    assert_exact(sliced, reference.linear_cross_entropy, [hidden_QD, weight_VD], label_Q)


def check_ignored_rows(engine: str) -> None:
    """An ignored row has no loss and leaves no gradient, also where its number is a token."""
    hidden_QD, weight_VD, label_Q = inputs(9, 50)
    hidden_QD.requires_grad_(), weight_VD.requires_grad_()
    keep = label_Q != 0
    assert not keep.all()
    run = partial(linear_cross_entropy, engine=engine, slice_tokens=16)
    loss_Q = run(hidden_QD, weight_VD, label_Q, ignore=0)
    assert torch.equal(loss_Q == 0, ~keep)
    upstream = torch.linspace(-1, 1, 9)
    found = torch.autograd.grad(loss_Q, (hidden_QD, weight_VD), upstream)
    alone = torch.autograd.grad(run(hidden_QD[keep], weight_VD, label_Q[keep]), (hidden_QD, weight_VD), upstream[keep])
    assert not found[0][~keep].any()
    for a, b in zip(found, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def check_shards(engine: str, shards: int) -> None:
    """Losses of uneven shards equal those of the whole; gradients of hidden states add up, of weights stand in line."""
    hidden_QD, weight_VD, label_Q = inputs(13, 90)
    label_Q[4] = -100
    upstream = torch.linspace(0.5, 2, 13)
    leaves = (hidden_QD.requires_grad_(), weight_VD.requires_grad_())
    whole = reference.linear_cross_entropy(*leaves, label_Q)
    dhidden, dweight = torch.autograd.grad(whole, leaves, upstream)

    parts = weight_VD.detach().split([20, 45, 25] if shards == 3 else [50, 40])
    firsts = [0, *torch.tensor([len(part) for part in parts]).cumsum(0).tolist()]
    group = Group(shards)

    def on(rank: int) -> list[Tensor]:
        shard = VocabShard(
            firsts[rank], partial(group.reduce, rank, torch.amax), partial(group.reduce, rank, torch.sum)
        )
        own = (hidden_QD.detach().requires_grad_(), parts[rank].clone().requires_grad_())
        loss_Q = linear_cross_entropy(*own, label_Q, shard=shard, engine=engine, slice_tokens=16)
        return [loss_Q, *torch.autograd.grad(loss_Q, own, upstream)]

    results = group.run(on)
    assert group.meetings == 2 * shards
    for loss_Q, _, _ in results:
        torch.testing.assert_close(loss_Q, whole, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(result[1] for result in results), dhidden, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([result[2] for result in results]), dweight, rtol=1e-6, atol=1e-6)


def head(numbers: Numbers, rows: int, width: int, vocab: int, slice_tokens: int, dtype: torch.dtype) -> Case:
    """A head of several slices; the first three rows have no label."""
    hidden_QD = numbers.normal(rows, width, key="hidden", dtype=dtype)
    weight_VD = numbers.normal(vocab, width, key="head", dtype=dtype) * width**-0.5
    label_Q = numbers.integers(vocab, rows, key="labels")
    label_Q[:3] = -100
    ours = partial(linear_cross_entropy, engine="triton", slice_tokens=slice_tokens)
    return Case(
        "linear cross-entropy",
        lambda hidden, weight: ours(hidden, weight, label_Q),
        lambda hidden, weight: reference.linear_cross_entropy(hidden, weight, label_Q),
        [hidden_QD, weight_VD],
    )


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
