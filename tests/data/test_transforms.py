import io

import numpy as np
import pytest
import torch
from PIL import Image

from megabagel.config.schema import ResizeConfig
from megabagel.data.decode.transforms import resize_target, to_rgb
from megabagel.sequence.patches import patchify
from tests.support.pictures import file_of, noise, turned

VAE = (ResizeConfig(1024, 512, 1806336), 16)
EDIT = (ResizeConfig(518, 224, 1806336), 14)
VLM = (ResizeConfig(980, 378, 2007040), 14)
DEMO = (ResizeConfig(980, 224, 1806336), 14)

# Results of the official code: width, height, images -> width, height.
SIZES = [
    (VAE, 857, 433, 5, 704, 352),  # max_pixels acts by the ratio of areas
    (VAE, 1957, 2578, 2, 784, 1024),
    (VAE, 3907, 3814, 12, 160, 144),  # pixels are rounded before strides are, half to even
    (VAE, 78, 2766, 5, 16, 704),  # never below one stride
    (VAE, 1284, 45, 1, 1024, 32),  # min_size asks for more than max_size allows
    (VAE, 415, 162, 1, 1024, 400),
    (VAE, 598, 925, 1, 592, 928),
    (EDIT, 2951, 36, 2, 518, 14),
    (EDIT, 415, 748, 1, 280, 518),
    (EDIT, 343, 682, 5, 266, 518),
    (EDIT, 3462, 3507, 12, 294, 294),
    (VLM, 491, 768, 1, 490, 770),
    (VLM, 2940, 225, 2, 980, 70),
    (VLM, 867, 856, 1, 868, 854),
    (DEMO, 667, 1126, 12, 154, 252),
]


@pytest.mark.parametrize(("branch", "width", "height", "images", "new_width", "new_height"), SIZES)
def test_resize_rule_is_the_official_one(
    branch: tuple[ResizeConfig, int], width: int, height: int, images: int, new_width: int, new_height: int
) -> None:
    assert resize_target(width, height, *branch, images) == (new_width, new_height)


def test_half_pixels_go_to_the_even_multiple() -> None:
    free = ResizeConfig(max_size=10_000, min_size=1, max_pixels=10**9)
    assert resize_target(40, 24, free, 16) == (32, 32)  # 2.5 and 1.5 strides


def test_patchify_against_loops() -> None:
    pixels, patch = torch.arange(3 * 6 * 9).reshape(3, 6, 9), 3
    rows = []
    for top in range(0, 6, patch):
        for left in range(0, 9, patch):
            rows.append(
                [pixels[c, top + y, left + x].item() for y in range(patch) for x in range(patch) for c in range(3)]
            )
    assert patchify(pixels, patch).tolist() == rows


def rgb(data: bytes) -> np.ndarray:
    """The file's pixels [height, width, 3] as shown."""
    image = to_rgb(Image.open(io.BytesIO(data)))
    assert image.mode == "RGB"
    return np.asarray(image)


AS_SHOWN = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", AS_SHOWN)
def test_exif_orientation(orientation: int) -> None:
    image = noise(5, 3)
    assert np.array_equal(rgb(turned(orientation, image)), AS_SHOWN[orientation](np.asarray(image)))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_on_white(mode: str) -> None:
    image = noise(16, 16, mode)
    layer = np.asarray(image).astype(float)
    colour, alpha = layer[..., :-1], layer[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (16, 16, 3))
    assert np.abs(rgb(file_of(image)) - expected).max() <= 1  # Pillow blends in integers


def test_a_transparent_palette_entry_is_white() -> None:
    image = noise(16, 16).quantize(4)
    data = file_of(image, transparency=2)
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 2] = 255
    assert np.array_equal(rgb(data), expected)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(format: str) -> None:
    levels = np.array([[0, 128, 129, 257, 0x8000, 51400, 65534, 65535]], np.uint16)
    shown = rgb(file_of(Image.fromarray(levels), format))
    assert shown.tolist() == [[[level] * 3 for level in (0, 0, 1, 1, 128, 200, 255, 255)]]


def test_bits_and_palettes() -> None:
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert np.array_equal(rgb(file_of(bits)), np.repeat(np.eye(8)[..., None] * 255, 3, axis=2))
    palette = noise(16, 16).quantize(8)
    assert np.array_equal(rgb(file_of(palette)), np.asarray(palette.convert("RGB")))


def test_cmyk_becomes_the_colours_of_paint() -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (255, 0, 0, 0): (0, 255, 255), (0, 255, 255, 0): (255, 0, 0)}
    for ink, colour in inks.items():
        shown = rgb(file_of(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
        assert np.abs(shown.astype(int) - colour).max() <= 3, ink


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(rgb(data), np.broadcast_to([255, 0, 0], (8, 12, 3)))
