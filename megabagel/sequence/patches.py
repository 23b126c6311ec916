"""Pictures as rows of patches and back: the same cut for ViT pixels and for latents (bagel-reference sections 2, 8).

Legend: C channels, H x W cells, p cells per patch side, D = p * p * C numbers of a patch.
"""

from torch import Tensor


def patchify(cells_CHW: Tensor, patch: int) -> Tensor:
    """[C, H, W] -> [H / p * W / p, D]: patches row by row; inside one: row, column, channel, channel fastest."""
    channels, height, width = cells_CHW.shape
    grid = cells_CHW.reshape(channels, height // patch, patch, width // patch, patch)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, patch * patch * channels)


def unpatchify(patches_TD: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """[rows * cols, D] -> [C, p rows, p cols]: the inverse of `patchify`."""
    grid = patches_TD.reshape(rows, cols, patch, patch, -1)
    return grid.permute(4, 0, 2, 1, 3).reshape(-1, rows * patch, cols * patch)
