"""Pictures as rows of patches and back: the same cut for ViT pixels and for latents (docs/bagel.md#vit, #vae).

Shape letters: docs/notation.md. A patch has p cells per side and Z = p * p * C numbers.
"""

from torch import Tensor


def patchify(cells_Chw: Tensor, patch: int) -> Tensor:
    """[C, h, w] -> [h / p * w / p, Z]: patches row by row; inside one: row, column, channel, channel fastest."""
    channels, height, width = cells_Chw.shape
    grid = cells_Chw.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(patches_PZ: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """[rows * cols, Z] -> [C, p rows, p cols]: the inverse of `patchify`."""
    grid = patches_PZ.reshape(rows, cols, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, cols * patch)
