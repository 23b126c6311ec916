"""Values from one process to another: what arrives is what was sent, in memory of its own."""

import errno
from multiprocessing import Pipe
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megabagel.data.load import shared_memory
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.sequence.batch import PackedBatch
from tests.data.test_loader import filled
from tests.support.batches import assert_same
from tests.support.small_run import small_config


def through(value: object) -> object:
    one, other = Pipe()
    shared_memory.send(one, value)
    return shared_memory.receive(other)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(7, dtype=torch.int64),
        torch.tensor(3.5),
        torch.zeros(0, 3),
        torch.tensor([True, False, True]),
        torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        torch.full((3, 2, 2), torch.nan),
        torch.arange(24.0).reshape(2, 3, 4).transpose(0, 2),
        torch.arange(100.0)[10:20],
        torch.arange(100.0)[::7],
        torch.arange(4, dtype=torch.int64)[1:2].as_strided((1,), (3,)),  # one element of a longer row
        torch.arange(3.0).expand(4, 3),
        torch.ones(1).expand(0, 5),
        torch.from_numpy(np.zeros((0, 2), np.int64)),  # numpy 2.4 gives it strides of 0
        torch.from_numpy(np.zeros(0, np.int64)).reshape(-1),
        torch.empty_strided((0,), (0,), dtype=torch.int64),
        torch.arange(4.0).view(torch.complex64).conj(),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}{tensor.stride()}",
)
def test_tensors_arrive_bit_for_bit(tensor: torch.Tensor) -> None:
    found = through(tensor)
    assert isinstance(found, torch.Tensor) and found.dtype == tensor.dtype and found.shape == tensor.shape
    assert (
        found.numpy().tobytes() == tensor.resolve_conj().numpy().tobytes()
        if tensor.dtype != torch.bfloat16
        else (torch.equal(found.view(torch.int16), tensor.view(torch.int16)))
    )
    found.zero_()  # it may be written to, and is not the sender's
    assert tensor.isnan().all() or tensor.numel() == 0 or tensor.any()


@pytest.mark.parametrize(
    "array",
    [
        np.array(5.0),
        np.zeros((0, 3), np.int64),
        np.zeros((3, 0)),
        np.broadcast_to(np.arange(3), (4, 3)),
        np.broadcast_to(np.arange(3)[:0], (4, 0)),
        np.arange(12.0).reshape(3, 4)[::-1, ::-2],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.array(["2020-01-01"], "datetime64[D]"),
        np.array([(1, 2.0)], [("a", "i4"), ("b", "f8")]),
        np.array(["ab", "c"]),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}{array.strides}",
)
def test_arrays_arrive_whatever_their_shape_and_strides(array: np.ndarray) -> None:
    found = through([array])[0]  # type: ignore[index]
    assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


def test_what_cannot_be_sent_leaves_the_line_usable() -> None:
    """No descriptor is left for the memory: the error is raised before a byte is written."""
    one, other = Pipe()
    with patch("socket.send_fds", side_effect=OSError(errno.ETOOMANYREFS, "too many")), pytest.raises(OSError):
        shared_memory.send(one, np.arange(3))
    shared_memory.send_small(one, "instead")
    shared_memory.send(one, "after")
    assert (shared_memory.receive(other), shared_memory.receive(other)) == ("instead", "after")


def test_a_tree_keeps_its_form_and_what_is_shared() -> None:
    array, tensor = np.arange(1000, dtype=np.int32), torch.arange(5)
    found = through({"a": [array, (tensor, tensor)], "b": "text", "c": np.zeros(0), "d": array[::3]})
    assert isinstance(found, dict)
    assert np.array_equal(found["a"][0], array) and found["a"][0].dtype == np.int32 and found["a"][0].flags.writeable
    assert found["a"][1][0] is found["a"][1][1] and torch.equal(found["a"][1][0], tensor)
    assert found["b"] == "text" and found["c"].shape == (0,) and np.array_equal(found["d"], array[::3])


def test_a_batch_arrives_whole(shapes: Path) -> None:
    _, batches = filled(small_config(shapes), steps=1)
    for batch in batches:
        found = through(batch)
        assert isinstance(found, PackedBatch)
        assert_same(found, batch)


def test_more_than_a_socket_holds_is_sent_without_a_reader() -> None:
    one, other = Pipe()
    for number in range(20):
        shared_memory.send(one, (number, torch.full((200_000,), number), "x" * 1_000_000))
    for number in range(20):
        found, tensor, text = shared_memory.receive(other)
        assert found == number and (tensor == number).all() and len(text) == 1_000_000


def test_memory_goes_with_its_last_holder() -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count("memfd:parcel")

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before, files = mapped(), open_files()
    found = through([torch.zeros(100_000), torch.ones(100_000)])
    assert isinstance(found, list) and mapped() == before + 1 and open_files() <= files + 2
    part = found[1]
    del found
    assert mapped() == before + 1 and (part == 1).all()
    del part
    assert mapped() == before


def test_a_sender_that_is_gone_is_an_end() -> None:
    one, other = Pipe()
    one.close()
    with pytest.raises(EOFError):
        shared_memory.receive(other)


def test_tokenizers_arrive_whole(shapes: Path) -> None:
    """Names of special tokens inside a text stay text: the library's own pickle forgets that."""
    for spec in ("bytes", str(shapes / "tokenizer.json")):
        tokenizer = load_tokenizer(spec)
        found = through(tokenizer)
        text = "a circle <|im_start|> on <|vision_end|>"
        assert found.encode(text) == tokenizer.encode(text)  # type: ignore[attr-defined]
        assert found.fingerprint() == tokenizer.fingerprint()  # type: ignore[attr-defined]
