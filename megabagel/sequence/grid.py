"""Grid ids of visual tokens: their row in the 2-D position tables (docs/bagel.md#position-tables)."""

import numpy as np


def grid_ids(rows: int, cols: int, grid: int, interpolate: bool) -> np.ndarray:
    """Return the ids of an image's tokens in a position table of `grid` x `grid` cells.

    A token at (r, c) has id `r' * grid + c'`. Without `interpolate`, r' = r and c' = c: the image lies in the table's
    top left corner. With it, the image is stretched over the whole table: r' = floor(r * grid / rows), likewise c'.

    Args:
        rows: tokens per column of the image.
        cols: tokens per row of the image.
        grid: cells per side of the table.
        interpolate: `model.interpolate_pos`.

    Returns:
        int64 [rows * cols], row-major.
    """
    row_h, col_w = np.arange(rows, dtype=np.int64), np.arange(cols, dtype=np.int64)
    # The released code buckets float32 fractions: coordinate i of n becomes the number of boundaries k / grid
    # (0 < k < grid) that are <= i / n. Integer division gives the same ids: two such fractions are either equal or at
    # least 1 / (n * grid) apart, so rounding to float32 does not change their order.
    if interpolate:
        row_h, col_w = row_h * grid // rows, col_w * grid // cols
    else:
        assert rows <= grid and cols <= grid, f"{rows} x {cols} tokens do not fit a grid of {grid} x {grid}"
    return (row_h[:, None] * grid + col_w).reshape(-1)
