"""Ids of the cells of a 2-D grid: rows of the position tables (docs/bagel.md#position-tables)."""

import numpy as np


def grid_ids(rows: int, cols: int, grid: int, interpolate: bool) -> np.ndarray:
    """Ids [rows * cols] int64, row-major, of an image of `rows` x `cols` tokens on a table of `grid` x `grid` cells.

    A token at (r, c) has id `r' * grid + c'`. Without `interpolate`, r' = r and c' = c: the image lies in the table's
    top left corner. With it, the image is stretched over the whole table: coordinate i of n becomes the number of
    boundaries k / grid (0 < k < grid) that are <= i / n. That is floor(i * grid / n), also when both fractions are
    rounded to float32 (they differ by 1 / (n * grid) or not at all), so integers do.
    """
    row_h, col_w = np.arange(rows, dtype=np.int64), np.arange(cols, dtype=np.int64)
    if interpolate:
        row_h, col_w = row_h * grid // rows, col_w * grid // cols
    else:
        assert rows <= grid and cols <= grid, f"{rows} x {cols} tokens do not fit a grid of {grid} x {grid}"
    return (row_h[:, None] * grid + col_w).reshape(-1)
