import logging
import pickle

import numpy as np
import pytest
import torch

from megabagel.data.decode import DecodeError, Request, choice, choose_engine, headers, measure
from megabagel.data.decode.dali import DaliEngine
from megabagel.data.decode.host import HostEngine, resample
from megabagel.errors import UserError
from tests.support.pictures import BAD, ODD, file_of, noise, turned


def decode(data: bytes, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """The views of a sound file."""
    (outcome,) = HostEngine()([Request(data, sizes)])
    assert isinstance(outcome, list)
    return outcome


def test_pixels_at_their_own_size_are_exact() -> None:
    image = noise(7, 5)
    (view,) = decode(file_of(image), (5, 7))
    assert view.dtype == torch.float32
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    assert torch.equal(view, ((levels.float() / 255) - 0.5) / 0.5)
    assert torch.allclose(view.double(), levels / 127.5 - 1, rtol=0, atol=1e-6)


def cubic(x: np.ndarray) -> np.ndarray:
    """The kernel of bicubic resampling, a = -1/2."""
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def weights(size: int, new: int) -> np.ndarray:
    """[new, size]: a pixel as a weighted mean of those around it; shrinking widens the kernel (antialiasing)."""
    scale = size / new
    width = max(scale, 1.0)
    centre = (np.arange(new) + 0.5) * scale
    taps = cubic((np.arange(size) + 0.5 - centre[:, None]) / width)
    return taps / taps.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(16, 32), (96, 48), (14, 14), (130, 70), (20, 130), (60, 17), (60, 90)])
def test_resize_is_antialiased_bicubic_rows_first(size: tuple[int, int]) -> None:
    """Columns are combined after rows were rounded to 8 bits, whatever the shape and the version of Pillow."""
    pixels = np.asarray(noise(90, 60)).astype(float)
    rows = np.einsum("wx,yxc->ywc", weights(90, size[1]), pixels).round().clip(0, 255)
    expected = np.einsum("hy,ywc->hwc", weights(60, size[0]), rows).round().clip(0, 255)
    off = np.abs(np.asarray(resample(noise(90, 60), *size)) - expected)
    assert off.max() <= 1 and off.mean() < 0.01  # Pillow's weights are integers


def test_several_views_of_one_decode_each_come_from_the_original() -> None:
    data = file_of(noise(60, 90), "JPEG")
    views = decode(data, (16, 16), (96, 48), (16, 16))
    assert [tuple(view.shape) for view in views] == [(3, 16, 16), (3, 96, 48), (3, 16, 16)]
    assert torch.equal(views[1], decode(data, (96, 48))[0])
    assert torch.equal(views[0], views[2])


def test_a_turned_image_is_resized_as_it_is_shown() -> None:
    image = noise(40, 24)
    (view,) = decode(turned(8, image), (40, 24))
    (plain,) = decode(file_of(image), (24, 40))
    assert torch.equal(view, plain.rot90(1, (1, 2)))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bad_file_costs_its_own_views_alone(threads: int) -> None:
    files = {name: data for name, (data, _) in (ODD | BAD).items()}
    outcomes = HostEngine(threads)([Request(data, ((28, 42),)) for data in files.values()])
    for name, outcome in zip(files, outcomes, strict=True):
        if name in BAD:
            assert isinstance(outcome, DecodeError) and outcome.reason == BAD[name][1], name
        else:
            assert isinstance(outcome, list) and torch.equal(outcome[0], decode(files[name], (28, 42))[0]), name


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_measured_and_decoded(name: str) -> None:
    data, size = ODD[name]
    assert measure(data, verify=True) == size
    assert measure(data, verify=False) == size
    (view,) = decode(data, (28, 42))
    assert view.shape == (3, 28, 42)
    assert view.min() >= -1 and view.max() <= 1


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_named(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(DecodeError) as caught:
        measure(data, verify=True)
    assert caught.value.reason == reason


def test_a_decompression_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "MAX_PIXELS", 200)
    assert measure(file_of(noise(20, 10)), verify=True) == (10, 20)
    with pytest.raises(DecodeError, match=r"too many pixels \(21 x 10\)"):
        measure(file_of(noise(21, 10)), verify=False)


@pytest.mark.parametrize(
    ("name", "device", "installed", "engine", "why"),
    [
        ("auto", "cpu", True, HostEngine(3), "host (Pillow"),
        ("auto", "cuda:1", False, HostEngine(3), "pip install 'megabagel[dali]'"),
        ("host", "cuda:1", True, HostEngine(3), "data.decode asks for it"),
        ("auto", "cuda:1", True, DaliEngine("cuda:1", 3), "training on a GPU"),
        ("dali", "cpu", True, DaliEngine("cpu", 3), "data.decode asks for it"),
    ],
)
def test_the_choice_of_engine_is_logged(
    name: str,
    device: str,
    installed: bool,
    engine: object,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if isinstance(engine, DaliEngine):
        pytest.importorskip("nvidia.dali")
    monkeypatch.setattr(choice, "_dali_installed", lambda: installed)
    with caplog.at_level(logging.INFO):
        assert choose_engine(name, device, 3) == engine
    assert f"decode engine: {'dali' if isinstance(engine, DaliEngine) else 'host'}" in caplog.text
    assert why in caplog.text


def test_dali_where_it_is_absent_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"data.decode=dali.*pip install 'megabagel\[dali\]'"):
        choose_engine("dali")


@pytest.mark.parametrize("engine", [HostEngine(2), DaliEngine("cpu", 2)])
def test_engines_travel_to_worker_processes(engine: object) -> None:
    assert pickle.loads(pickle.dumps(engine)) == engine
