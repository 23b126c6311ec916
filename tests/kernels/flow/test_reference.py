"""Rectified flow in torch, by hand."""

import pytest
import torch
from megabagel_kernels.flow import flow_losses, noise_latents

X0 = torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])
EPS = torch.tensor([[0.5, -1.0], [1.0, 2.0], [-3.0, 0.0]])


def test_time_runs_from_image_to_noise():
    x_t = noise_latents(X0, EPS, torch.tensor([0.0, 1.0, 0.25]))
    assert torch.equal(x_t, torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 4.5]]))


def test_loss_and_gradient_by_hand():
    v = torch.tensor([[0.5, -1.0], [0.0, 7.0], [2.0, 2.0]], requires_grad=True)
    losses = flow_losses(v, EPS - X0, torch.tensor([1.0, 0.5, 0.0]))  # v - (eps - x0): (1, 2), (2, 1), (10, 8)
    loss = losses.total_G
    assert loss.tolist() == [2.5, 1.25, 0.0]
    assert losses.mse_G.tolist() == [2.5, 2.5, 82.0] and losses.distance_G is None
    (gradient,) = torch.autograd.grad(loss.sum(), v)
    assert gradient.tolist() == [[1.0, 2.0], [1.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_computed_in_fp32(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    v, x0, eps = (torch.randn(7, 65, generator=draw).to(dtype) for _ in range(3))
    t, weight = torch.rand(7, generator=draw).to(dtype), torch.rand(7, generator=draw)
    x_t, loss = noise_latents(x0, eps, t), flow_losses(v, eps.float() - x0.float(), weight).total_G
    assert x_t.dtype == loss.dtype == torch.float32
    v, x0, eps, t, weight = (x.double() for x in (v, x0, eps, t, weight))
    expected = ((v - (eps - x0)) ** 2).mean(1) * weight
    assert torch.allclose(loss.double(), expected, rtol=1e-6, atol=0)
    assert torch.allclose(x_t.double(), (1 - t)[:, None] * x0 + t[:, None] * eps, rtol=0, atol=1e-6)
