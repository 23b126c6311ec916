"""FP8 quantization in Triton against the torch engine, bit for bit.

In Triton's interpreter; run by `tests/kernels/triton/test_in_interpreter.py`, in a process of its own.
"""

import os

import pytest
import torch
from megabagel_kernels.float8 import E4M3, E5M2, ROW_32, ROW_128, Format, Tiles, quantize

from tests.kernels.exactness import guarded_memory
from tests.kernels.float8.cases import edges
from tests.kernels.guards import guarded
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("code", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("tiles", [ROW_128, ROW_32], ids=["128", "32"])
@pytest.mark.parametrize("rows, columns", [(21, 40), (1, 1100)])
def test_equals_torch(tiles: Tiles, code: Format, dtype: torch.dtype, rows: int, columns: int):
    x_TD = edges(rows, columns, dtype)
    found, expected = quantize(guarded(x_TD), code, tiles, engine="triton"), quantize(x_TD, code, tiles)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert torch.equal(found.factors.view(torch.uint8), expected.factors.view(torch.uint8))


@pytest.mark.parametrize("code", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_every_code_and_midpoint(code: Format):
    values = torch.arange(256, dtype=torch.uint8).view(code.dtype).float()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles, middles.nextafter(values[1:]), middles.nextafter(values[:-1])])
    tiled = torch.nn.functional.pad(points, (0, -len(points) % 127)).view(-1, 127)
    # The first number of each tile makes its scale 1.
    x_TD = torch.nn.functional.pad(tiled, (1, 0), value=code.largest).view(1, -1)
    found, expected = quantize(x_TD, code, ROW_128, engine="triton"), quantize(x_TD, code, ROW_128)
    assert torch.equal(found.codes.view(torch.uint8), expected.codes.view(torch.uint8))
    assert (found.factors == 1).all()


def test_no_rows_and_meta_tensors():
    for x_TD in (torch.zeros(0, 130), torch.zeros(3, 130, device="meta")):
        found = quantize(x_TD, E4M3, ROW_128, engine="triton")
        assert found.codes.shape == x_TD.shape and found.factors.shape == (len(x_TD), 2)
