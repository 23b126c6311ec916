"""Sampling formulas against values worked out by hand or by an independent definition."""

import math

import numpy as np
import pytest
import torch

from megabagel.errors import UserError
from megabagel.sampling.guidance import Guidance, branches, guide
from megabagel.sampling.taylorseer import TaylorSeer, is_full
from megabagel.sampling.timesteps import euler_step, timestep_grid

V = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
V_TEXT = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
V_IMAGE = torch.tensor([[1.0, 0.0], [0.0, 0.0]])


def test_grid_has_one_step_less_than_points_and_ends_exactly() -> None:
    grid = timestep_grid(5, 3.0)
    assert grid.dtype == np.float32 and len(grid) == 5
    assert grid.tolist() == [1.0, np.float32(0.9), 0.75, 0.5, 0.0]  # 3 u / (1 + 2 u) at 1, 3/4, 1/2, 1/4, 0
    assert timestep_grid(1, 3.0).tolist() == [1.0], "one point: the noise comes back"
    assert timestep_grid(4, 3.0)[2] == np.float32(0.59999996), "float32 arithmetic of the released sampler"


def test_euler_step_moves_against_the_velocity() -> None:
    assert euler_step(torch.tensor([2.0]), torch.tensor([4.0]), 1.0, 0.75).tolist() == [1.0]


@pytest.mark.parametrize(
    ("t", "guided"),
    [(1.0, True), (0.4, False), (float(np.nextafter(np.float32(0.4), np.float32(1))), True), (0.0, False)],
)
def test_interval_excludes_its_lower_and_includes_its_upper_end(t: float, guided: bool) -> None:
    assert (Guidance(4.0, 2.0, (0.4, 1.0)).scales(np.float32(t)) == (4.0, 2.0)) is guided


def test_no_branch_is_needed_without_text_guidance() -> None:
    assert branches((1.0, 2.0)) == (False, False)
    assert branches((4.0, 1.0)) == (True, False)
    assert branches((4.0, 2.0)) == (True, True)
    assert guide(V, None, None, (1.0, 2.0), Guidance()) is V


def by_definition(s: float, r: float, renorm: str, least: float) -> torch.Tensor:
    """Token by token with Python's own arithmetic."""

    def far(a: list[list[float]], b: list[list[float]], scale: float) -> list[list[float]]:
        return [[x + scale * (y - x) for x, y in zip(p, q, strict=True)] for p, q in zip(a, b, strict=True)]

    def shortened(tokens: list[list[float]], whole: bool) -> list[list[float]]:
        norm = [math.hypot(*token) for token in tokens]
        goal = [math.hypot(*token) for token in V.tolist()]
        if whole:
            norm, goal = [math.hypot(*norm)] * len(norm), [math.hypot(*goal)] * len(goal)
        factors = [min(max(g / (n + 1e-8), least), 1.0) for g, n in zip(goal, norm, strict=True)]
        return [[x * f for x in token] for token, f in zip(tokens, factors, strict=True)]

    found = far(V_TEXT.tolist(), V.tolist(), s)
    if renorm == "text_channel":
        found = shortened(found, whole=False)
    if r > 1:
        found = far(V_IMAGE.tolist(), found, r)
    return torch.tensor(found if renorm == "text_channel" else shortened(found, whole=renorm == "global"))


@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
@pytest.mark.parametrize("least", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("s", "r"), [(4.0, 2.0), (1.25, 1.0), (4.0, 1.0)])
def test_guidance_is_its_definition(renorm: str, least: float, s: float, r: float) -> None:
    how = Guidance(s, r, renorm=renorm, renorm_min=least)  # type: ignore[arg-type]
    assert torch.allclose(guide(V, V_TEXT, V_IMAGE, (s, r), how), by_definition(s, r, renorm, least), atol=1e-6)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(UserError, match="cfg_renorm_type='local': expected one of global, channel, text_channel"):
        Guidance(renorm="local")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"cfg_renorm_min=2: expected a number from 0 to 1"):
        Guidance(renorm_min=2)


def test_taylorseer_computes_five_evaluations_and_then_every_third() -> None:
    assert [n for n in range(17) if is_full(n)] == [0, 1, 2, 3, 4, 7, 10, 13, 16]


def test_taylorseer_continues_a_line_exactly() -> None:
    """After evaluation 4 there is a first difference, so features that move evenly are extrapolated without error."""
    seer = TaylorSeer()
    for number in range(5):
        seer.update(number, torch.tensor([2.0 * number + 1]))
    assert len(seer.factors) == 2
    assert [seer.extrapolate(n).item() for n in (5, 6)] == [11.0, 13.0]
    seer.update(7, torch.tensor([15.0]))
    assert seer.extrapolate(9).item() == 19.0 and len(seer.factors) == 3
