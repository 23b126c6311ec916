"""Packed linears: values of torch's linear, the same bits beside any number of rows, nothing packed where untrue."""

import pytest
import torch
from torch import nn

from megabagel.inference import packed
from megabagel.inference.packed import PackedLinear, pack_linears


class Stage(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(96, 160, dtype=dtype)
        self.inner = nn.ModuleDict({"0": nn.Linear(160, 40, bias=False, dtype=dtype)})
        self.norm = nn.LayerNorm(40, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.inner["0"](self.first(x)))


@torch.inference_mode()
def test_values_are_those_of_the_linears() -> None:
    stage, x = Stage(), torch.randn(7, 96)
    expected = stage(x)
    assert pack_linears(stage)
    assert isinstance(stage.first, PackedLinear) and isinstance(stage.inner["0"], PackedLinear)
    assert not any(parameter.ndim == 2 for parameter in stage.parameters()), "the plain weights take no memory"
    torch.testing.assert_close(stage(x), expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("inputs", [32, 96, 512, 1408])
def test_a_row_has_the_same_bits_beside_any_number_of_others(inputs: int) -> None:
    linear, x = PackedLinear(torch.randn(264, inputs), torch.randn(264)), torch.randn(300, inputs)
    whole = linear(x)
    for start, stop in ((0, 1), (7, 8), (3, 6), (100, 165), (299, 300)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop]), (start, stop)


@torch.inference_mode()
def test_products_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, seen = PackedLinear(torch.randn(16, 32), None), set()
    product = linear._linear

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.add(len(x))
        return product(x, *rest)

    monkeypatch.setattr(linear, "_linear", counted)
    x = torch.randn(2500, 32)
    whole = linear(x)
    for rows in range(2500):
        assert torch.equal(linear(x[:rows]), whole[:rows]), rows
        assert rows <= packed.filled(rows) < max(3, 1.5 * rows) + 2
    assert len(seen) <= 37


@torch.inference_mode()
def test_nothing_is_packed_where_bits_depend_on_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(PackedLinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + len(x) % 4 * 1e-6

    stage = Stage()
    monkeypatch.setattr(packed, "PackedLinear", Other)
    assert not pack_linears(stage) and isinstance(stage.first, nn.Linear)


def test_other_dtypes_stay_as_they_are() -> None:
    stage = Stage(torch.bfloat16)
    assert not pack_linears(stage) and isinstance(stage.first, nn.Linear)
