"""Reward to weights: scores -> map over pixels -> latent tokens -> `alpha * R + lambda_c` (SRUM equations 1 to 3).

    L_r   = E[alpha R (v - (eps - x_0))^2]      (1)
    L_ref = E[(v - (eps - x_0'))^2]             (2)     x_0' is x_0 unless the record has a good and a bad picture
    L     = L_r + lambda_c L_ref                (3)

With x_0' = x_0 both terms are one squared error with one weight per token, alpha R + lambda_c. There is no frozen model
in it and no second forward pass.

The map R over pixels has two rules, of which the paper prints one and the released code runs another:

    code    R = max(0.5, largest (s + 1) / 2 of the boxes over the pixel): in [0, 1], a score below 0 changes nothing
    paper   R = the s of largest |s| of the boxes over the pixel, 0 outside of all: in [-1, 1], may repel

The paper gives no rule for overlaps; of two opposite scores of one size the negative one counts.

Suffixes: hw pixels or tokens of the grid, L latent tokens.
"""

from dataclasses import dataclass

import numpy as np

from megabagel.config.schema import RewardConfig
from megabagel.rewards.regions import Region, Reward

BASE = 0.5
"""R of rule `code` outside of all boxes: the weight of the neutral score 0."""


@dataclass(frozen=True)
class TokenWeights:
    """Weights of the two terms for the latent tokens of one picture, row by row, fp32 [L]."""

    reward_L: np.ndarray
    """alpha * R, after the floor: weight of (v - (eps - x_0))^2."""
    constraint: float
    """lambda_c: weight of (v - (eps - x_0'))^2."""

    @property
    def total_L(self) -> np.ndarray:
        """Weight of the squared error where both targets are one."""
        return self.reward_L + np.float32(self.constraint)


def token_weights(reward: Reward, size: tuple[int, int], grid: tuple[int, int], rules: RewardConfig) -> TokenWeights:
    """Weights of the latent tokens of a picture.

    Args:
        reward: its scores, with boxes in pixels of the stored picture.
        size: height and width of the stored picture in pixels. Boxes are not rescaled to the training size: the map
            covers the stored picture, and tokens pool it from there.
        grid: rows and columns of latent tokens.
        rules: `config.reward`.
    """
    map_hw = global_factor(reward, rules) * reward_map(reward, size, rules)
    return floored(pooled(map_hw, grid, rules.pooling).reshape(-1), rules)


def floored(reward_L: np.ndarray, rules: RewardConfig) -> TokenWeights:
    """Token weights of pooled rewards alpha * R, with `reward.floor` on the sum of both terms.

    A negative sum makes the loss of a token unbounded below: gradient ascent on its error.
    """
    if rules.floor is not None:
        reward_L = np.maximum(reward_L, np.float32(rules.floor - rules.constraint))
    return TokenWeights(reward_L.astype(np.float32), rules.constraint)


def global_factor(reward: Reward, rules: RewardConfig) -> float:
    """alpha: the layout score on [0, 1], so that two negative scores do not make a positive weight.

    A missing layout score counts as the neutral 0, as released; without `reward.use_layout` alpha is 1.
    """
    return ((reward.layout or 0.0) + 1) / 2 if rules.use_layout else 1.0


def reward_map(reward: Reward, size: tuple[int, int], rules: RewardConfig) -> np.ndarray:
    """R over the pixels of a picture of `size` (height, width), fp32 [h, w], by `reward.rule`."""
    regions = _scored(reward, size, rules)
    # Sorted so that the region that counts in an overlap is painted last: the order of a record has no influence.
    if rules.rule == "code":
        map_hw = np.full(size, BASE, np.float32)
        for region in sorted(regions, key=lambda r: r.score):
            if (shifted := (region.score + 1) / 2) > BASE:
                map_hw[_inside(region, size)] = shifted
        return map_hw
    map_hw = np.zeros(size, np.float32)
    for region in sorted(regions, key=lambda r: (abs(r.score), -r.score)):
        map_hw[_inside(region, size)] = region.score
    return map_hw


def _scored(reward: Reward, size: tuple[int, int], rules: RewardConfig) -> list[Region]:
    """Regions after the ablations: one for the whole picture, or scores of +1 and -1."""
    regions = list(reward.regions)
    if rules.level == "picture":
        scores = [region.score for region in regions] or [0.0]
        score = sum(scores) / len(scores) if reward.overall is None else reward.overall
        regions = [Region((0, 0, size[1], size[0]), score)]
    if rules.binary:
        regions = [Region(region.box, 1.0 if region.score > 0 else -1.0) for region in regions]
    return regions


def _inside(region: Region, size: tuple[int, int]) -> tuple[slice, slice]:
    """The part of a box that lies in the picture."""
    (height, width), (left, top, right, bottom) = size, region.box
    return slice(max(top, 0), max(min(bottom, height), 0)), slice(max(left, 0), max(min(right, width), 0))


def pooled(map_hw: np.ndarray, grid: tuple[int, int], pooling: str) -> np.ndarray:
    """Rewards of latent tokens, fp32 [rows, columns], from a map over pixels.

    Args:
        map_hw: R, or alpha R, per pixel.
        grid: rows and columns of tokens.
        pooling: `centre`: bilinear at the centre of each token, as released; at the usual 16 pixels per token the mean
            of the four pixels around the centre, so that a narrow box may be missed. `area`: mean over all its pixels.
    """
    matrix = {"centre": _centre, "area": _area}[pooling]
    height, width = map_hw.shape
    return (matrix(height, grid[0]) @ map_hw.astype(np.float64) @ matrix(width, grid[1]).T).astype(np.float32)


def _centre(pixels: int, tokens: int) -> np.ndarray:
    """[tokens, pixels] weights of linear interpolation at token centres (align_corners false, no antialias)."""
    at = np.maximum((np.arange(tokens) + 0.5) * pixels / tokens - 0.5, 0.0)
    low = np.floor(at).astype(np.int64)
    matrix = np.zeros((tokens, pixels))
    # `add.at`, because both neighbours are the same pixel at the last one.
    np.add.at(matrix, (np.arange(tokens), low), 1 - (at - low))
    np.add.at(matrix, (np.arange(tokens), np.minimum(low + 1, pixels - 1)), at - low)
    return matrix


def _area(pixels: int, tokens: int) -> np.ndarray:
    """[tokens, pixels] weights of the mean over a token's interval; pixels on its border count by their part."""
    edges = np.arange(tokens + 1) * (pixels / tokens)
    starts = np.arange(pixels)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0) * (tokens / pixels)
