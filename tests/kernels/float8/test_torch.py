"""FP8 in torch: the formats against OCP's tables, the recipes against their definition and against golden numbers."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from megabagel_kernels.float8 import (
    COLUMN_32,
    COLUMN_128,
    E4M3,
    E5M2,
    ROW_32,
    ROW_128,
    SQUARE_128,
    TENSOR,
    Format,
    Quantized,
    Tiles,
    dequantize,
    quantize,
    quantize_with_scale,
    reference,
    updated_scale,
)
from megabagel_kernels.float8.torch import quotient, saturated

from tests.kernels.float8.cases import edges, hashed
from tests.kernels.float8.make_golden import DTYPES, FORMATS, GOLDEN, SHAPES, digest, key

both_formats = pytest.mark.parametrize("code", [E4M3, E5M2], ids=["e4m3", "e5m2"])
ONE = torch.ones(1)


def ofp8(code: Format, byte: int) -> float:
    """The value of a byte, from table 1 of OCP's OFP8 specification."""
    sign = -1.0 if byte & 0x80 else 1.0
    if code is E4M3:
        exponent, mantissa = byte >> 3 & 15, byte & 7
        if (exponent, mantissa) == (15, 7):
            return math.nan
        return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))
    exponent, mantissa = byte >> 2 & 31, byte & 3
    if exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    return sign * (mantissa * 2.0**-16 if exponent == 0 else (4 + mantissa) * 2.0 ** (exponent - 17))


def finite(code: Format) -> list[tuple[int, float]]:
    return [(byte, ofp8(code, byte)) for byte in range(256) if math.isfinite(ofp8(code, byte))]


def bytes_of(values: list[float], code: Format) -> list[int]:
    return list(saturated(torch.tensor(values, dtype=torch.float32), code).view(torch.uint8).tolist())


@both_formats
def test_all_codes(code: Format) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(code.dtype)
    found = dequantize(Quantized(codes, torch.ones(1, 1), TENSOR))[0].tolist()
    for byte in range(256):
        assert found[byte] == ofp8(code, byte) or (math.isnan(found[byte]) and math.isnan(ofp8(code, byte)))
    assert bytes_of([value for _, value in finite(code)], code) == [byte for byte, _ in finite(code)]
    assert max(value for _, value in finite(code)) == code.largest
    assert [ofp8(code, byte) for byte in range(128) if math.isfinite(ofp8(code, byte))] == reference.values(code)


@both_formats
@pytest.mark.parametrize("sign", [0, 0x80])
def test_every_midpoint_and_its_neighbours(code: Format, sign: int) -> None:
    half = [(byte, value) for byte, value in finite(code) if byte & 0x80 == sign]
    sides: dict[int, list[float]] = {-1: [], 0: [], 1: []}
    for (_, low), (_, high) in pairwise(half):
        middle = torch.tensor((low + high) / 2)
        for side, points in sides.items():
            points.append(float(torch.nextafter(middle, torch.tensor(low if side < 0 else high)) if side else middle))
    below, above = [byte for byte, _ in half[:-1]], [byte for byte, _ in half[1:]]
    assert bytes_of(sides[-1], code) == below
    assert bytes_of(sides[1], code) == above
    assert bytes_of(sides[0], code) == [low if low % 2 == 0 else high for low, high in zip(below, above, strict=True)]
    assert [reference.encode(point, code) for side in (-1, 0, 1) for point in sides[side]] == [
        byte for side in (-1, 0, 1) for byte in bytes_of(sides[side], code)
    ]


@both_formats
def test_saturation_and_nan(code: Format) -> None:
    top = 0x7E if code is E4M3 else 0x7B
    beyond = [code.largest * 1.2, 1e30, math.inf, -math.inf, math.nan, -math.nan]
    assert bytes_of(beyond, code) == [top, top, top, top | 0x80, 0x7F, 0x7F]


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "tiles", [TENSOR, ROW_128, COLUMN_128, SQUARE_128, ROW_32, COLUMN_32],
    ids=["tensor", "row 128", "column 128", "square 128", "row 32", "column 32"],
)  # fmt: skip
@pytest.mark.parametrize("rows, columns", [(24, 70), (1, 7)])
def test_equals_the_definition(tiles: Tiles, code: Format, dtype: torch.dtype, rows: int, columns: int) -> None:
    for x_TD in (x := edges(rows, columns, dtype), x.T):
        found = quantize(x_TD, code, tiles)
        codes, factors = reference.quantize(x_TD, code, tiles)
        assert torch.equal(found.codes.view(torch.uint8), codes)
        stored = found.factors.view(torch.uint8) if tiles.scale == "e8m0" else found.factors
        assert torch.equal(stored, factors)


SCALES = [
    (448.0, 1.0, 1.0, 127),
    (512.0, 0.875, 0.5, 128),
    (448.5, 448 / 448.5, 0.5, 128),
    (3.5, 128.0, 128.0, 120),
    (1.75, 256.0, 256.0, 119),
    (1.7578125, 448 / 1.7578125, 128.0, 120),
    (0.0, 1.0, 1.0, 0),
    (math.inf, 1.0, 1.0, 254),
    (2.0**-126, torch.finfo(torch.float32).max, 2.0**127, 0),
    (2.0**-149, torch.finfo(torch.float32).max, 2.0**127, 0),
]
"""amax; E4M3 scales of the recipes current (before rounding to fp32) and blockwise, E8M0 byte of mxfp8. Worked out by
hand from Transformer Engine's compute_scale_from_amax and float_to_e8m0."""


@pytest.mark.parametrize("amax, tensor_scale, block_scale, exponent", SCALES)
def test_golden_scales(amax: float, tensor_scale: float, block_scale: float, exponent: int) -> None:
    x_TD = torch.tensor([[0.0, -amax, math.nan]])
    assert quantize(x_TD, E4M3, TENSOR).factors.item() == torch.tensor(tensor_scale).float().reciprocal().item()
    for tiles in (ROW_128, SQUARE_128):
        assert quantize(x_TD, E4M3, tiles).factors.item() == 1 / block_scale
    assert quantize(x_TD, E4M3, ROW_32).factors.view(torch.uint8).item() == exponent


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_references_of_transformer_engine(shape: tuple[int, int], dtype: torch.dtype) -> None:
    golden, x_TD = json.loads(GOLDEN.read_text()), hashed(*shape, dtype)
    row_as_tensor = Tiles(1, None, TENSOR.scale)
    recipes = {"row": ROW_128, "column": COLUMN_128, "square": SQUARE_128, "tensor": row_as_tensor}
    for name, code in FORMATS.items():
        for tiles_name, tiles in recipes.items():
            case, found = key(shape, dtype, name, tiles_name), quantize(x_TD, code, tiles)
            assert [digest(found.codes), digest(found.factors)] == golden[case], case


@both_formats
def test_scales_are_quotients_rounded_once(code: Format) -> None:
    amax = torch.cat([
        torch.arange(1, 0x7F80, dtype=torch.int32) << 16,  # every bf16
        torch.arange(0x3F800000, 0x40000000, 509, dtype=torch.int32),  # mantissas of fp32
    ]).view(torch.float32)  # fmt: skip
    with np.errstate(over="ignore"):
        exact = torch.from_numpy(np.float32(code.largest) / amax.numpy())
    assert torch.equal(quotient(code.largest, amax), exact)
    exact = exact.clamp(max=torch.finfo(torch.float32).max)
    # Tiles of one number. The factor of a scale hides its last bit, a power of two shows all of it.
    expected = torch.from_numpy(1 / 2.0 ** (np.frexp(exact.numpy())[1] - 1.0)).float()
    assert torch.equal(quantize(amax[:, None], code, Tiles(1, 1, "power_of_two")).factors[:, 0], expected)
    for largest in (1.1, 3.0, 1000.0):
        scale = updated_scale(torch.zeros(2), ONE, ONE * largest, code)[1]
        assert scale.item() == np.float32(code.largest) / np.float32(largest)


def test_tiles_do_not_saturate_and_keep_their_precision() -> None:
    x_TD = edges(300, 260, torch.float32)[40:]
    for tiles in (ROW_128, COLUMN_128, SQUARE_128, ROW_32, COLUMN_32):
        found = quantize(x_TD, E4M3, tiles)
        error = (dequantize(found) - x_TD).abs()
        rows, columns = x_TD.shape
        height, width = tiles.of((rows, columns))
        step = found.factors.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        assert (error <= torch.maximum(x_TD.abs() * 2.0**-4, step * 2.0**-10)).all()


def test_both_directions_of_a_square_tile_share_their_codes() -> None:
    x_TD = edges(140, 200, torch.bfloat16)
    one, other = quantize(x_TD, E4M3, SQUARE_128), quantize(x_TD.T.contiguous(), E4M3, SQUARE_128)
    assert torch.equal(one.codes.view(torch.uint8), other.codes.view(torch.uint8).T)


@pytest.mark.parametrize("tiles", [TENSOR, ROW_128, COLUMN_128, SQUARE_128, ROW_32])
def test_no_rows(tiles: Tiles) -> None:
    found = quantize(torch.zeros(0, 256), E4M3, tiles)
    assert dequantize(found).shape == (0, 256)


def test_delayed_scaling() -> None:
    history_W, scale = torch.zeros(3), ONE
    seen = []
    for amax in (4.0, 2.0, 1.0, 0.5, 0.0, 0.0):
        x_TD = torch.tensor([[amax, -amax / 2]])
        found, measured = quantize_with_scale(x_TD, E4M3, scale)
        assert measured.item() == amax and torch.equal(dequantize(found), x_TD)
        history_W, scale = updated_scale(history_W, scale, measured, E4M3)
        seen.append(scale.item())
    # Three steps back: 4 leaves the history of three before the fourth scale is chosen; after only zeros it stays.
    assert seen == [112.0, 112.0, 112.0, 224.0, 448.0, 896.0]
    assert history_W[0] == 0
    for amax in (math.inf, 0.0):
        assert updated_scale(torch.zeros(3), ONE * 7, ONE * amax, E4M3)[1] == 7
    assert updated_scale(torch.zeros(1), ONE, ONE * 2.0**-149, E4M3)[1] == torch.finfo(torch.float32).max
    assert updated_scale(torch.zeros(1), ONE, ONE * 7, E4M3, margin=2)[1] == 16
    late, amax = quantize_with_scale(torch.tensor([[1000.0]]), E4M3, ONE)
    assert dequantize(late) == 448 and amax == 1000  # saturates in the step of the outlier, which the history records


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \[T, D\]"):
        quantize(torch.zeros(3), E4M3, ROW_128)
    with pytest.raises(ValueError, match=r"x has dtype torch\.float64, expected torch\.float32 or"):
        quantize(torch.zeros(3, 3).double(), E4M3, ROW_128)
    with pytest.raises(ValueError, match="engine 'triton' expects tiles of one row"):
        quantize(torch.zeros(3, 3), E4M3, SQUARE_128, engine="triton")
    with pytest.raises(ValueError, match=r"scale has shape \(2,\), expected \(1,\)"):
        quantize_with_scale(torch.zeros(3, 3), E4M3, torch.ones(2))
