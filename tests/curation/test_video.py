"""Shots, borders, overlays and frames of videos made for it; decoding itself where PyAV is installed."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megabagel.curation.measure.shots import content_box, cuts, overlay_share, scan, shift
from megabagel.curation.read import decode_video
from megabagel.curation.video import _cropped, motion_caption
from megabagel.data.index.index import build_index, find_shards
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from tests.curation.conftest import Inline, contents, curated
from tests.curation.test_models import direct, run
from tests.curation.test_reasoning import A, B, Draft

__all__ = ["direct"]

RATE = 10
LOGO = Image.fromarray(np.kron(np.indices((5, 5)).sum(0) % 2, np.full((8, 8), 255)).astype(np.uint8))


def scene(seed: int, frames: int, pan: int = 2, side: int = 300) -> list[Image.Image]:
    """Frames of a camera that moves to the right over a picture."""
    rng = np.random.default_rng(seed)
    cells = Image.fromarray(rng.integers(0, 256, (30, 90, 3), dtype=np.uint8))
    wide = cells.resize((900, side), Image.Resampling.BICUBIC)
    return [wide.crop((pan * n, 0, pan * n + side, side)) for n in range(frames)]


def greys(frames: Sequence[Image.Image]) -> Iterator[tuple[float, np.ndarray]]:
    for number, frame in enumerate(frames):
        yield number / RATE, np.asarray(frame.convert("L").resize((160, 160)))


def test_cuts_are_where_scenes_meet() -> None:
    frames = [*scene(1, 15), *scene(2, 20), *scene(3, 12)]
    assert cuts(scan(greys(frames)).differences) == [15, 35]
    assert cuts(scan(greys(scene(4, 40, pan=12))).differences) == []  # a fast camera is no cut
    flash = [*scene(5, 10), Image.new("RGB", (300, 300), "white"), *scene(5, 10)]
    assert cuts(scan(greys(flash)).differences) == [10, 11]
    assert cuts([0.0]) == [] and cuts([0.0, 99.0]) == [1]


def test_borders_and_overlays() -> None:
    frames = []
    for frame in scene(1, 20, pan=7):
        framed = Image.new("RGB", (400, 400))
        framed.paste(frame, (50, 50))
        framed.paste(LOGO, (60, 60))
        frames.append(framed)
    box = content_box(scan(greys(frames)).brightest)
    assert np.abs(np.array(box) - [1 / 8, 1 / 8, 7 / 8, 7 / 8]).max() < 0.02
    inner = [frame.crop((50, 50, 350, 350)) for frame in frames]
    assert overlay_share(scan(greys(inner))) > 0.01 and overlay_share(scan(greys(scene(1, 20, pan=7)))) == 0.0
    assert content_box(np.zeros((4, 4), np.uint8)) == (0, 0, 0, 0)
    assert _cropped(frames[0], [*box]).size == (300, 300)
    assert _cropped(frames[0], [0.01, 0.0, 0.99, 1.0]).size == (400, 400)  # less than 2 % stays


def test_the_view_moves_and_is_worded() -> None:
    first, second = (np.asarray(frame.convert("L").resize((160, 160))) for frame in (scene(1, 1)[0], scene(1, 11)[10]))
    assert abs(shift(first, second)[1] + 20 * 160 / 300) <= 1  # the content moves left by 20 of 300 pixels
    assert motion_caption(A, A) == "Hardly anything changes."


VIDEOS = {
    "cuts.mp4": [*scene(1, 25), *scene(2, 20), *scene(3, 5)],
    "again.mp4": scene(2, 20),
    "still.mp4": scene(7, 1) * 30,
    "one.mp4": scene(6, 1),
    "small.mp4": scene(8, 20, side=200),
}
RECIPE: dict[str, Any] = {
    "name": "video",
    "read": {"kind": "video"},
    "steps": ["shots", "clip_length", "clip_clarity", "clip_motion", "overlays"],
}
RECIPE["steps"] += ["near_clips", "frames", "change_captions"]


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of videos that are decoded from VIDEOS instead of their files."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in VIDEOS:
        (folder / name).write_bytes(name.encode())
    monkeypatch.setattr(decode_video, "small_frames", lambda path: greys(VIDEOS[path.name]))
    monkeypatch.setattr(decode_video, "full_frames", lambda path, numbers: [VIDEOS[path.name][n] for n in numbers])
    return folder


def test_videos_become_frames_with_the_change_between_them(videos: Path, tmp_path: Path, inline: Inline) -> None:
    report = curated(RECIPE, videos, tmp_path / "out")
    dropped = {tally.step: dict(tally.documents) for tally in report.steps if tally.documents}
    assert report.steps[0].documents_out == 7
    assert dropped == {
        "clip_length": {"clip too short": 2},
        "clip_motion": {"hardly any motion": 1},
        "near_clips": {"near duplicate of a clip": 1},
        "frames": {"a side below 256": 1},
    }
    lines = [json.loads(line) for path in sorted((tmp_path / "out" / "provenance").iterdir()) for line in path.open()]
    assert [(line["source"], line["frames"]) for line in lines] == [("again.mp4", [0, 20]), ("cuts.mp4", [0, 25])]
    for line in lines:
        assert 2 <= len(line["picked"]) <= 8 and line["picked"] == sorted(set(line["picked"]))
        steps = np.diff(line["picked"]) / RATE
        assert np.allclose(line["frame_delta"], steps, atol=2e-3)
    index = build_index(find_shards(tmp_path / "out" / "shards", "video-*.tar"), ByteTokenizer(), "interleave")
    first = index.documents[0]
    assert len(first.images) == len(first.texts) + 1 == len(lines[0]["picked"])
    assert index.text(first.texts[0]).startswith("The camera")
    again = curated({**RECIPE, "batch": 3}, videos, tmp_path / "again")
    assert again.samples == 2 and contents(tmp_path / "again") == contents(tmp_path / "out")


def test_captions_by_a_model_are_asked_again_and_cut(tmp_path: Path) -> None:
    seen = []

    def answer(text: str) -> str:
        seen.append(text)
        return "The cat walks to the door, " + "then it looks back, " * (30 if len(seen) == 1 else 8)

    (draft,), _ = run("change_captions", answer, tmp_path, Draft("k", (A, B)), by="model")
    assert len(seen) == 2 and draft.items[0] == A and draft.items[2] == B
    assert draft.text == "The cat walks to the door" + ", then it looks back" * 4


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from megabagel.errors import UserError

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install 'megabagel\[video\]'"):
        list(decode_video.small_frames(tmp_path / "a.mp4"))


def test_files_that_are_no_videos(tmp_path: Path, inline: Inline) -> None:
    av = pytest.importorskip("av")
    frames = [*scene(1, 25), *scene(2, 20)]
    for name in ("whole.mp4", "cut.mkv"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("mpeg4", rate=RATE)
            stream.width = stream.height = 300
            stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())
    whole = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.avi").write_bytes(b"")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    assert cuts(scan(decode_video.small_frames(tmp_path / "whole.mp4")).differences) == [25]
    found = decode_video.full_frames(tmp_path / "whole.mp4", [0, 30])
    for image, original in zip(found, (frames[0], frames[30]), strict=True):
        assert np.abs(np.asarray(image, float) - np.asarray(original, float)).mean() < 12
    report = curated({**RECIPE, "name": "odd"}, tmp_path, tmp_path / "out")
    assert report.steps[0].documents == {"not a video": 2, "no video stream": 1} and report.samples >= 1
