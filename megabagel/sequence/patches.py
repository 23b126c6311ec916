"""Patchify and unpatchify, used for ViT pixels and for latents alike (docs/bagel.md#vit, #vae).

Shape letters: docs/notation.md. A patch has p cells per side and Z = p * p * C numbers.
"""

from torch import Tensor


def patchify(cells_Chw: Tensor, patch: int) -> Tensor:
    """Cut [C, h, w] into patches [h / p * w / p, Z], row by row; inside a patch row, column, channel (fastest)."""
    channels, height, width = cells_Chw.shape
    grid = cells_Chw.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(patches_PZ: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """Assemble patches to [C, rows * p, cols * p]: the inverse of `patchify`.

    Args:
        patches_PZ: [rows * cols, Z] patches of one image.
        rows: patches per column of the image.
        cols: patches per row of the image.
        patch: p, cells per side of a patch.
    """
    grid = patches_PZ.reshape(rows, cols, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, cols * patch)
