"""Codec `blocks`: a training-free image code of 16 numbers per 8x8 block, for machines without VAE weights.

Every 8x8 block is converted to YCbCr and transformed by an orthonormal DCT. The first 10 luma and 3 + 3 chroma
coefficients in zigzag order are kept and normalized to mean 0 and standard deviation 1 by fixed constants. The whole
map is linear: encoding is a strided convolution, decoding a transposed one, and encode(decode(z)) is z.

Shape letters: docs/notation.md. (u, v): vertical and horizontal frequency in a block.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 8
KEPT = (10, 3, 3)
"""Number of coefficients kept of Y, Cb and Cr."""

# Mean and standard deviation of each kept coefficient of pixels in [-1, 1], Y then Cb then Cr. Without normalization
# the flow loss would be dominated by the mean brightness of blocks. Measured by tools/measure_blocks.py, equal weight
# for two sources: 400 drawings of one flat shape on a light ground (64 x 64), and the 801 PNG photographs and drawings
# of Debian's tuxpaint-stamps-default 2022.06.04 on white, at most 256 pixels a side.
MEAN = (
    *(4.7498, 0.0043, 0.0019, -0.0014, -0.0004, 0.0069, 0.0018, -0.0004, -0.0001, 0.0022),
    *(-0.3090, -0.0007, 0.0013),
    *(0.2401, 0.0006, 0.0014),
)
STD = (
    *(3.9855, 1.0515, 0.9705, 0.4969, 0.5000, 0.5356, 0.3048, 0.3219, 0.3057, 0.2905),
    *(1.2048, 0.2896, 0.2775),
    *(1.1589, 0.2605, 0.2626),
)


def dct_matrix(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix [frequency, sample] in float64."""
    index = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * torch.outer(index, index + 0.5))
    waves[0] /= math.sqrt(2)
    return waves * math.sqrt(2 / size)


def zigzag(size: int) -> list[tuple[int, int]]:
    """Return (vertical, horizontal) frequencies of a block in JPEG's zigzag order, from low to high."""
    cells = [(u, v) for u in range(size) for v in range(size)]
    return sorted(cells, key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]))


def ycbcr_matrix() -> Tensor:
    """Return the RGB to YCbCr matrix [3, 3] of ITU-R BT.601 in float64, without offsets."""
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    red, _, blue = torch.eye(3, dtype=torch.float64)
    return torch.stack([luma, (blue - luma) / 1.772, (red - luma) / 1.402])


def block_kernels() -> tuple[Tensor, Tensor]:
    """Return (analysis, synthesis) kernels, float64 [C, 3, 8, 8] each.

    Analysis holds the pixel weights of each coefficient, synthesis the pixels that a coefficient of 1 adds.
    """
    dct, to_ycc = dct_matrix(BLOCK), ycbcr_matrix()
    to_rgb = torch.linalg.inv(to_ycc)
    kept = [(plane, u, v) for plane, count in enumerate(KEPT) for u, v in zigzag(BLOCK)[:count]]
    waves = [(plane, torch.outer(dct[u], dct[v])) for plane, u, v in kept]
    analysis = torch.stack([to_ycc[plane, :, None, None] * wave for plane, wave in waves])
    synthesis = torch.stack([to_rgb[:, plane, None, None] * wave for plane, wave in waves])
    return analysis, synthesis


class BlockCodec:
    """Deterministic codec of 8x8 DCT blocks; seeds are ignored.

    Computes in float64, because on GPUs float32 convolutions may run in TF32.
    """

    channels = moment_channels = sum(KEPT)
    downsample = BLOCK

    def __init__(self, device: torch.device | str = "cpu") -> None:
        analysis, synthesis = block_kernels()
        self._analysis, self._synthesis = analysis.to(device), synthesis.to(device)
        self._mean_C11 = torch.tensor(MEAN, dtype=torch.float64, device=device)[:, None, None]
        self._std_C11 = torch.tensor(STD, dtype=torch.float64, device=device)[:, None, None]

    @torch.no_grad()
    def coefficients(self, pixels_B3hw: Tensor) -> Tensor:
        """Return the kept coefficients, float64 [B, 16, h/8, w/8], before normalization."""
        return F.conv2d(pixels_B3hw.double(), self._analysis, stride=BLOCK)

    @torch.no_grad()
    def moments(self, pixels_B3hw: Tensor) -> Tensor:
        """Return the latents, float32 [B, 16, h/8, w/8], of pixels in [-1, 1]."""
        return ((self.coefficients(pixels_B3hw) - self._mean_C11) / self._std_C11).float()

    def draw(self, moments_BChw: Tensor, generator_seeds: Sequence[int] = ()) -> Tensor:
        """Return the moments: they are the latents."""
        return moments_BChw

    def encode(self, pixels_B3hw: Tensor, generator_seeds: Sequence[int] = ()) -> Tensor:
        """Return the latents, float32 [B, 16, h/8, w/8], of pixels in [-1, 1]; h and w are multiples of 8."""
        return self.moments(pixels_B3hw)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Return pixels, float32 [B, 3, 8 h, 8 w]; they may leave [-1, 1] for latents that no real image has."""
        coefficients = latents_BChw.double() * self._std_C11 + self._mean_C11
        return F.conv_transpose2d(coefficients, self._synthesis, stride=BLOCK).float()
