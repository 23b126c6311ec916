"""Shots, borders, overlays and motion of frames at low resolution; NumPy only, one pass, no frame is kept.

The memory of a scan is a few numbers per frame and three maps of one frame, whatever the length of the video.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megabagel.curation.measure.pictures import clarity, difference_hash

Grey = NDArray[np.uint8]
WIDTH = 160
"""Width in pixels at which frames are compared."""
NEIGHBOURS = 8
"""Frames on each side with which a difference is compared."""


@dataclass
class Scan:
    """Numbers of the frames of one video."""

    times: list[float] = field(default_factory=list)
    """Seconds of every frame."""
    differences: list[float] = field(default_factory=list)
    """Mean |difference| to the frame before in levels; 0 for the first."""
    clarities: list[float] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    brightest: Grey | None = None
    """Highest level of every pixel over all frames."""
    _mean: NDArray[np.float64] | None = None
    _square: NDArray[np.float64] | None = None
    _last: NDArray[np.float32] | None = None

    def add(self, seconds: float, grey: Grey) -> None:
        """Take one more frame, WIDTH pixels wide."""
        levels = grey.astype(np.float32)
        if self._last is None or self._last.shape != levels.shape:
            difference = 0.0
            self.brightest, self._mean, self._square = grey.copy(), np.zeros(grey.shape), np.zeros(grey.shape)
        else:
            difference = float(np.abs(levels - self._last).mean())
        assert self.brightest is not None and self._mean is not None and self._square is not None
        np.maximum(self.brightest, grey, out=self.brightest)
        self._last = levels
        self.times.append(seconds)
        self.differences.append(difference)
        self.clarities.append(clarity(grey))
        self.hashes.append(difference_hash(grey))
        step = levels - self._mean
        self._mean += step / len(self.times)
        self._square += step * (levels - self._mean)

    def still(self) -> NDArray[np.bool_]:
        """Pixels that hardly change over all frames: standard deviation below 2 levels."""
        assert self._square is not None
        return np.asarray(np.sqrt(self._square / max(1, len(self.times))) < 2)

    def mean_frame(self) -> NDArray[np.float64]:
        """Mean of all frames."""
        assert self._mean is not None
        return self._mean


def scan(frames: Iterable[tuple[float, Grey]]) -> Scan:
    """Numbers of (seconds, grey levels) frames."""
    found = Scan()
    for seconds, grey in frames:
        found.add(seconds, grey)
    return found


def cuts(differences: Sequence[float], least: float = 15.0, ratio: float = 3.0) -> list[int]:
    """Numbers of the frames that begin a new shot.

    A cut is a mean difference of at least `least` levels and of `ratio` times the median of the NEIGHBOURS frames on
    each side. A threshold on the difference of histograms instead misses cuts between shots of like brightness.

    Args:
        differences: per frame, the difference to the one before.
        least: levels.
        ratio: over the median of the neighbours.
    """
    found = []
    for number, value in enumerate(differences):
        if number == 0 or value < least:
            continue
        before = differences[max(1, number - NEIGHBOURS) : number]
        around = [*before, *differences[number + 1 : number + 1 + NEIGHBOURS]]
        if value >= ratio * (float(np.median(around)) if around else 0.0):
            found.append(number)
    return found


def content_box(brightest: Grey, level: int = 24) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is ever brighter than `level`, as shares of width and height."""
    rows, columns = (np.flatnonzero((brightest > level).any(axis)) for axis in (1, 0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    height, width = brightest.shape
    left, right, top, bottom = int(columns[0]), int(columns[-1]) + 1, int(rows[0]), int(rows[-1]) + 1
    return left / width, top / height, right / width, bottom / height


def overlay_share(found: Scan) -> float:
    """Share of pixels of a logo or text that stays: still, with strong edges in the mean, near the border.

    0 where more than a tenth of the picture is still, as with a camera on a stand: then nothing tells an overlay from
    the scene (measured: 0.13 to 0.30 for two recordings of that kind, below 0.1 for five others).
    """
    still = found.still()
    if still.mean() > 0.1:
        return 0.0
    mean = found.mean_frame()
    edges = np.abs(np.gradient(mean)[0]) + np.abs(np.gradient(mean)[1]) > 24
    height, width = mean.shape
    border = np.ones_like(still)
    border[height // 4 : -height // 4 or None, width // 4 : -width // 4 or None] = False
    return float((still & edges & border).mean())


def shift(first: Grey, second: Grey) -> tuple[int, int]:
    """Pixels (down, right) by which the second frame's content has moved, by phase correlation."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1]))
    one, other = (np.fft.rfft2((x - x.mean()) * window) for x in (first.astype(float), second.astype(float)))
    cross = other * np.conj(one)
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), first.shape)
    down, right = np.unravel_index(int(peak.argmax()), peak.shape)
    height, width = first.shape
    return (int(down) + height // 2) % height - height // 2, (int(right) + width // 2) % width - width // 2
