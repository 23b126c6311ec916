import logging

import numpy as np
import pytest
import torch

from megabagel.data import decode as module
from megabagel.data.decode import DecodeError, choose_engine, decode, measure
from tests.data.pictures import BAD, ODD, file_of, noise, turned


def test_pixels_at_their_own_size_are_exact() -> None:
    image = noise(7, 5)
    (view,) = decode(file_of(image), [(5, 7)])
    assert view.dtype == torch.float32
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    assert torch.equal(view, ((levels.float() / 255) - 0.5) / 0.5)
    assert torch.allclose(view.double(), levels / 127.5 - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 32), (96, 48), (14, 14), (130, 70)])
def test_resize_is_antialiased_bicubic(size: tuple[int, int]) -> None:
    image = noise(60, 90).point(lambda level: 64 + level // 2)  # overshoots stay within 8 bits
    (view,) = decode(file_of(image), [size])
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()[None]
    expected = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)[0]
    assert (view * 127.5 + 127.5 - expected).abs().max() <= 2


def test_several_views_of_one_decode_each_come_from_the_original() -> None:
    data = file_of(noise(60, 90), "JPEG")
    views = decode(data, [(16, 16), (96, 48), (16, 16)])
    assert [tuple(view.shape) for view in views] == [(3, 16, 16), (3, 96, 48), (3, 16, 16)]
    assert torch.equal(views[1], decode(data, [(96, 48)])[0])
    assert torch.equal(views[0], views[2])


def test_a_turned_image_is_resized_as_it_is_shown() -> None:
    image = noise(40, 24)
    (view,) = decode(turned(8, image), [(40, 24)])
    (plain,) = decode(file_of(image), [(24, 40)])
    assert torch.equal(view, plain.rot90(1, (1, 2)))


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_measured_and_decoded(name: str) -> None:
    data, size = ODD[name]
    assert measure(data, verify=True) == size
    assert measure(data, verify=False) == size
    (view,) = decode(data, [(28, 42)])
    assert view.shape == (3, 28, 42)
    assert view.min() >= -1 and view.max() <= 1


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(name: str) -> None:
    data, reason = BAD[name]
    for use in (lambda: measure(data, verify=True), lambda: decode(data, [(16, 16)])):
        with pytest.raises(DecodeError) as caught:
            use()
        assert caught.value.reason == reason


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 200)
    assert measure(file_of(noise(20, 10)), verify=True) == (10, 20)
    with pytest.raises(DecodeError, match=r"too many pixels \(21 x 10\)"):
        measure(file_of(noise(21, 10)), verify=False)


@pytest.mark.parametrize(("name", "why"), [("auto", "the only engine"), ("host", "data.decode asks for it")])
def test_the_choice_of_engine_is_logged(name: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_engine(name) is decode
    assert "decode engine: host" in caplog.text and why in caplog.text
