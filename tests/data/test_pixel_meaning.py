"""Pixels by what their file says of them: depth, sign, white at zero, transparency; side chunks are no pixels."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megabagel.data.decode import headers
from megabagel.data.decode.contract import DecodeError
from megabagel.data.decode.headers import decode, measure, open_image, orientation
from tests.support.pictures import file_of, noise

LEVELS = np.array([[0, 128, 257, 0x8000, 51400, 65535]], np.uint16)
SHOWN = [0, 0, 1, 128, 200, 255]


def tiff(pixels: np.ndarray, order: str, photometric: int = 1, sample_format: int = 1, bits: int = 16) -> bytes:
    """A file of one strip, uncompressed, grey."""
    height, width = pixels.shape
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data)), (339, sample_format)]
    entries = b"".join(struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    at = 8 + len(data) + len(data) % 2
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", at)
    return head + data + bytes(len(data) % 2) + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def grey(blob: bytes) -> list[int]:
    return np.asarray(decode(blob))[0, :, 0].tolist()


@pytest.mark.parametrize("order", ["<", ">"])
def test_white_may_be_zero(order: str) -> None:
    assert grey(tiff(LEVELS, order)) == SHOWN
    assert grey(tiff(LEVELS, order, photometric=0)) == [255 - level for level in SHOWN]
    assert measure(tiff(LEVELS, order, photometric=0), verify=True) == (1, 6)


@pytest.mark.parametrize("order", ["<", ">"])
def test_signed_pixels_have_no_range(order: str) -> None:
    with pytest.raises(DecodeError):
        decode(tiff(LEVELS.astype(np.int16), order, sample_format=2))


def test_the_range_is_that_of_the_declared_bits() -> None:
    packed = bytes([0x00, 0x07, 0xFF, 0xFF, 0xF8, 0x00])  # 12-bit 0, 2047, 4095, 2048
    blob = bytearray(tiff(np.frombuffer(packed, np.uint8).reshape(1, 6), "<", bits=12))
    at = blob.index(struct.pack("<HHIHH", 256, 3, 1, 6, 0))
    blob[at : at + 12] = struct.pack("<HHIHH", 256, 3, 1, 4, 0)
    assert grey(bytes(blob)) == [0, 127, 255, 128]


def chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def png(depth: int, colour: int, rows: bytes, width: int, clear: bytes = b"") -> bytes:
    """A PNG of one row."""
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    middle = chunk(b"tRNS", clear) if clear else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(b"\0" + rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("blob", "shown"),
    [
        (png(16, 0, LEVELS.astype(">u2").tobytes(), 6, struct.pack(">H", 257)), [0, 0, 255, 128, 200, 255]),
        (png(4, 0, bytes([0x0F, 0x5F]), 4, struct.pack(">H", 5)), [0, 255, 255, 255]),
        (png(2, 0, bytes([0b00011011]), 4, struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(1, 0, bytes([0b01000000]), 2, struct.pack(">H", 0)), [255, 255]),
        (png(8, 0, bytes([0, 5, 9]), 3, struct.pack(">H", 5)), [0, 255, 9]),
        (png(16, 2, struct.pack(">6H", 9, 9, 9, 0x1234, 0, 0), 2, struct.pack(">3H", 0x1234, 0, 0)), [0, 255]),
    ],
)  # fmt: skip
def test_a_transparent_level_is_one_of_the_files_own_depth(blob: bytes, shown: list[int]) -> None:
    assert grey(blob) == shown


PNG = file_of(noise(8, 8))
PIXELS = np.asarray(Image.open(io.BytesIO(PNG)))
HUGE = zlib.compress(bytes(2**21))
ODD = {
    "huge zTXt": (b"zTXt", b"k\0\0" + HUGE),
    "huge iTXt": (b"iTXt", b"k\0\1\0\0\0" + HUGE),
    "huge iCCP": (b"iCCP", b"k\0\0" + HUGE),
    "empty iCCP": (b"iCCP", b""),
    "short gAMA": (b"gAMA", b"\0"),
    "short pHYs": (b"pHYs", b"\0"),
    "short cHRM": (b"cHRM", b"\0"),
    "short tRNS": (b"tRNS", b"\0"),
    "empty sRGB": (b"sRGB", b""),
    "garbage eXIf": (b"eXIf", b"garbage"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("case", ODD)
def test_a_bad_side_chunk_is_no_damage_of_the_pixels(case: str, place: str) -> None:
    at = 33 if place == "before" else len(PNG) - 12
    blob = PNG[:at] + chunk(*ODD[case]) + PNG[at:]
    assert np.array_equal(np.asarray(decode(blob)), PIXELS)
    assert measure(blob, verify=False) == (8, 8)
    half = blob[: len(PNG) // 2]
    with pytest.raises(DecodeError):
        decode(half)


def test_a_checksum_of_a_side_chunk_is_no_damage_either() -> None:
    bad = bytearray(chunk(b"gAMA", bytes(4)))
    bad[-1] ^= 1
    assert np.array_equal(np.asarray(decode(PNG[:33] + bytes(bad) + PNG[33:])), PIXELS)


@pytest.mark.parametrize("tag", [(0x010E, 5, 2, 0xFFFFFFFF), (0x8827, 2, 5, 26), (0x011A, 12, 0, 0), (0x0213, 9, 9, 9)])
def test_one_odd_tag_does_not_lose_a_turned_photo(tag: tuple[int, int, int, int]) -> None:
    entries = sorted([struct.pack("<HHII", *tag), struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)])
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(8)
    image = noise(8, 16)
    blob = file_of(image, "JPEG", exif=exif)
    assert orientation(open_image(blob)) == 6
    upright = np.asarray(Image.open(io.BytesIO(file_of(image, "JPEG"))))
    assert np.array_equal(np.asarray(decode(blob)), np.rot90(upright, -1))
    assert measure(blob, verify=True) == measure(blob, verify=False) == (8, 16)


def test_alpha_that_is_zero_everywhere_is_none_in_a_bitmap() -> None:
    header = (
        struct.pack("<IiiHHIIiiII4I", 124, 2, 1, 1, 32, 3, 8, 0, 0, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        + b"BGRs"
        + bytes(64)
    )
    blob = b"BM" + struct.pack("<IHHI", 14 + 124 + 8, 0, 0, 14 + 124) + header[:124] + bytes([0, 0, 255, 0] * 2)
    assert np.asarray(decode(blob)).tolist() == [[[255, 0, 0]] * 2]


def test_more_than_the_largest_picture_is_refused_by_its_header() -> None:
    header = struct.pack(">IIBBBBB", 11585, 11585, 8, 2, 0, 0, 0)
    with pytest.raises(DecodeError, match="too many pixels"):
        headers.measure(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""), verify=True)
