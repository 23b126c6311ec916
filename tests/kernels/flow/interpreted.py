"""Noising and flow losses in Triton, and their references, against plain definitions in fp64.

In Triton's interpreter; run by `test_in_interpreter.py`, in a process of its own.
"""

import os
from dataclasses import replace

import pytest
import torch
from megabagel_kernels.flow import FlowLosses, KeyedTarget, LatentImages, Reference, flow_losses, noised_rows
from megabagel_kernels.philox import noise_rows
from torch import Tensor

from tests.kernels.case import CPU
from tests.kernels.exactness import (
    assert_exact,
    assert_gradients_rounded_once,
    both_types,
    every_type,
    guarded_memory,
    low_types,
    relative,
)  # fmt: skip
from tests.kernels.flow import cases
from tests.kernels.triton import bf16_shim

assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
bf16_shim.install()
pytestmark = pytest.mark.usefixtures(guarded_memory.__name__)

SIZES = [(4, 6), (8, 4), (2, 2), (2, 10)]
TIMES = [0.3, 0.9, 1.0, 0.0, 0.62]
SEEDS = [5, -7, 2**62 + 11, 0, 2**32]
USES = [0, 1, 2, 3, 0]
"""Image 0 stands twice in the table, under two timesteps and seeds."""

engines = pytest.mark.parametrize("engine", ["torch", "triton"])


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + 31 * len(shape))).to(dtype)


def latents(channels: int, patch: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], LatentImages]:
    """Images [channels, height, width], and their table; between them the buffer holds NaN."""
    images = [normal(channels, h, w, dtype=dtype) for h, w in SIZES]
    gap = torch.full((3,), torch.nan, dtype=dtype)
    latents = torch.cat([gap] + [part for image in images for part in (image.flatten(), gap)])
    starts = [3]
    for image in images[:-1]:
        starts.append(starts[-1] + image.numel() + 3)
    of_use = torch.tensor(USES)
    start, height, width = (torch.tensor(x)[of_use] for x in (starts, [h for h, _ in SIZES], [w for _, w in SIZES]))
    table = LatentImages(
        latents, start, height.int(), width.int(), torch.tensor(TIMES), torch.tensor(SEEDS), channels, patch
    )
    return images, table


def tokens(image: Tensor, patch: int) -> Tensor:
    """Patches one by one: row, column, channel, channel fastest."""
    _, height, width = image.shape
    return torch.stack(
        [
            torch.stack([image[:, y + p, x + q] for p in range(patch) for q in range(patch)]).flatten()
            for y in range(0, height, patch)
            for x in range(0, width, patch)
        ]
    )


def rows_of(table: LatentImages, extra: int) -> tuple[Tensor, Tensor]:
    """Every token of every use and some padding, in a random order."""
    counts = table.height_I.long() * table.width_I.long() // table.patch**2
    image = torch.cat([torch.repeat_interleave(torch.arange(len(counts)), counts), torch.full((extra,), -1)])
    place = torch.cat([*(torch.arange(count) for count in counts), torch.arange(extra) + 10**6])
    order = torch.randperm(len(image), generator=torch.Generator().manual_seed(3))
    return image[order], place[order]


@engines
@both_types
@pytest.mark.parametrize("channels, patch", [(16, 2), (3, 2), (5, 1)])
def test_rows_are_patches_and_noise(engine: str, dtype: torch.dtype, channels: int, patch: int):
    images, table = latents(channels, patch, dtype)
    image_G, patch_index_G = rows_of(table, 5)
    found = noised_rows(table, image_G.int(), patch_index_G, engine=engine)
    truth, x0_GZ, eps_GZ = (torch.zeros(len(image_G), table.features).double() for _ in range(3))
    for row, (use, place) in enumerate(zip(image_G.tolist(), patch_index_G.tolist(), strict=True)):
        if use >= 0:
            eps_GZ[row] = noise_rows(torch.tensor([SEEDS[use]]), torch.tensor([place]), table.features)[0]
            x0_GZ[row] = tokens(images[USES[use]], patch)[place]
            t = torch.tensor(TIMES[use]).double()
            truth[row] = (1 - t) * x0_GZ[row] + t * eps_GZ[row]
    assert relative(found.target_GZ, eps_GZ - x0_GZ) <= 1e-6 and found.target_GZ.dtype == torch.float32
    assert torch.equal(found.real_G, image_G >= 0)
    assert torch.equal(found.x_t_GZ[image_G == 3], x0_GZ[image_G == 3].float())  # timestep 0: bit by bit
    assert relative(found.x_t_GZ, truth) <= 1e-6
    assert not found.x_t_GZ[image_G < 0].any() and not found.target_GZ[image_G < 0].any()
    rounded = noised_rows(table, image_G, patch_index_G, torch.bfloat16, engine=engine).x_t_GZ
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, found.x_t_GZ.bfloat16())


@engines
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_of_a_lost_image_are_not_real(engine: str, bad: float):
    _, table = latents(16, 2)
    image_G, patch_index_G = rows_of(table, 2)
    whole = noised_rows(table, image_G, patch_index_G, engine=engine)
    table.latents[table.start_I[1] : table.start_I[1] + 16 * 8 * 4] = bad
    found = noised_rows(table, image_G, patch_index_G, engine=engine)
    assert torch.equal(found.real_G, (image_G >= 0) & (image_G != 1))
    keep = found.real_G[:, None]
    assert torch.equal(found.x_t_GZ, whole.x_t_GZ * keep) and torch.equal(found.target_GZ, whole.target_GZ * keep)


def test_the_loss_remakes_the_noise_of_its_input():
    """Where t is 0, x_t is x_0 itself, and its target the velocity: a prediction of it has no error at all."""
    _, table = latents(16, 2)
    table = replace(table, time_I=torch.zeros(5))
    image_G, patch_index_G = rows_of(table, 0)
    rows = noised_rows(table, image_G, patch_index_G, engine="triton")
    target = KeyedTarget(rows.x_t_GZ, table.seed_I[image_G], patch_index_G)
    assert not flow_losses(rows.target_GZ, target, torch.ones(len(image_G)), engine="triton").total_G.any()


@both_types
@pytest.mark.parametrize("rows, width", [(1, 64), (17, 12), (129, 64)])
def test_losses(rows: int, width: int, dtype: torch.dtype):
    for case in cases.losses(CPU, rows, width, dtype):
        assert_exact(case.ours, case.reference, case.leaves)


@engines
@both_types
def test_losses_for_the_log(engine: str, dtype: torch.dtype):
    v_GZ, target = 2 * normal(17, 64, dtype=dtype), cases.keyed_target(CPU, 17, 64, dtype)
    weight_G = normal(17).abs()
    for reference in (None, Reference(normal(17, 64, dtype=dtype).flip(0), weight_G)):
        losses = flow_losses(v_GZ, target, weight_G, reference, engine=engine)
        assert_logged(losses, v_GZ, target, reference)


def assert_logged(losses: FlowLosses, v_GZ: Tensor, target: Tensor | KeyedTarget, reference: Reference | None) -> None:
    """Losses for the log carry no weight and no gradient."""
    velocity = target if isinstance(target, Tensor) else target.velocity()
    assert relative(losses.mse_G, (v_GZ.double() - velocity.double()).square().mean(1)) <= 1e-6
    assert not losses.mse_G.requires_grad
    if reference is None:
        assert losses.distance_G is None
    else:
        assert losses.distance_G is not None
        assert relative(losses.distance_G, (v_GZ.double() - reference.velocity_GZ.double()).square().mean(1)) <= 1e-6


@engines
def test_losses_by_hand(engine: str):
    v_GZ = torch.tensor([[1.0, 2.0], [0.0, 3.0]], requires_grad=True)
    reference = Reference(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0.5, 2.0]))
    losses = flow_losses(v_GZ, torch.zeros(2, 2), torch.tensor([2.0, 0.0]), reference, engine=engine)
    assert losses.mse_G.tolist() == [2.5, 4.5] and losses.distance_G.tolist() == [2.0, 4.5]
    assert losses.total_G.tolist() == [2.5 * 2 + 2 * 0.5, 4.5 * 2]
    (gradient,) = torch.autograd.grad(losses.total_G, v_GZ, torch.tensor([1.0, 10.0]))
    assert gradient.tolist() == [[2.0, 5.0], [0.0, 60.0]]


@every_type
def test_permuted_rows_give_permuted_bits(dtype: torch.dtype):
    rows, width = 67, 64
    v_GZ, target, weight_G = (
        normal(rows, width, dtype=dtype).requires_grad_(),
        cases.keyed_target(CPU, rows, width, dtype),
        normal(rows).abs(),
    )
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    moved = KeyedTarget(target.x0_GZ[order], target.seed_G[order], target.patch_index_G[order].int())
    plain = flow_losses(v_GZ, target, weight_G, engine="triton").total_G
    shuffled = flow_losses(v_GZ[order], moved, weight_G[order], engine="triton").total_G
    assert torch.equal(shuffled, plain[order])
    gradients = [torch.autograd.grad(x.sum(), v_GZ)[0] for x in (plain, shuffled)]
    assert torch.equal(*gradients) and gradients[0].dtype == dtype


@low_types
def test_the_gradient_is_rounded_once(dtype: torch.dtype):
    target, weight_G = cases.keyed_target(CPU, 17, 64, dtype), normal(17).abs()
    assert_gradients_rounded_once(
        lambda v_GZ: flow_losses(v_GZ, target, weight_G, engine="triton").total_G, [normal(17, 64, dtype=dtype)]
    )


def test_no_rows_and_no_gradient():
    _, table = latents(16, 2)
    none = torch.zeros(0, dtype=torch.int64)
    assert noised_rows(table, none, none, engine="triton").x_t_GZ.shape == (0, 64)
    target, weight_G = cases.keyed_target(CPU, 5, 64, torch.float32), torch.ones(5)
    with torch.no_grad():
        losses = flow_losses(normal(5, 64), target, weight_G, engine="triton")
    with_gradient = flow_losses(normal(5, 64).requires_grad_(), target, weight_G, engine="triton")
    assert torch.equal(losses.total_G, with_gradient.total_G) and not losses.total_G.requires_grad


V, ONES, INDEX = torch.zeros(5, 64), torch.ones(5), torch.zeros(5, dtype=torch.int64)
TABLE = latents(16, 2)[1]
BIG = LatentImages(
    torch.zeros(2**31 + 1, device="meta"),
    *(getattr(TABLE, name).to("meta") for name in ("start_I", "height_I", "width_I", "time_I", "seed_I")), 16, 2,
)  # fmt: skip
NO_IMAGES = LatentImages(TABLE.latents, *[TABLE.start_I[:0]] * 3, TABLE.time_I[:0], TABLE.seed_I[:0], 16, 2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: flow_losses(V, V[1:], ONES, engine="triton"), r"target_GZ has shape \(4, 64\), expected \(5, 64\)"),
        (lambda: flow_losses(V, V, ONES[1:], engine="triton"), r"weight_G has shape \(4,\), expected \(5,\)"),
        (
            lambda: flow_losses(V, V, ONES.double(), engine="triton"),
            r"weight_G has dtype torch.float64, expected",
        ),
        (lambda: flow_losses(V.T, V.T, ONES, engine="triton"), r"v_GZ has stride 64 along axis 1, expected 1"),
        (
            lambda: flow_losses(V, V.to("meta"), ONES, engine="triton"),
            r"target_GZ is on meta, the first argument on cpu",
        ),
        (lambda: flow_losses(V[0], V, ONES, engine="triton"), r"v_GZ has shape \(64,\), expected \[G, Z\]"),
        (
            lambda: flow_losses(V, KeyedTarget(V, INDEX.int(), INDEX), ONES, engine="triton"),
            r"seed_G has dtype torch.int32, expected torch.int64",
        ),
        (
            lambda: flow_losses(V, V, ONES, Reference(V[:, 1:], ONES), engine="triton"),
            r"reference velocity_GZ has shape \(5, 63\), expected \(5, 64\)",
        ),
        (
            lambda: noised_rows(TABLE, INDEX, INDEX[1:], engine="triton"),
            r"patch_index_G has shape \(4,\), expected \(5,\)",
        ),
        (
            lambda: noised_rows(TABLE, INDEX.float(), INDEX, engine="triton"),
            r"image_G has dtype torch.float32, expected",
        ),
        (
            lambda: noised_rows(TABLE, INDEX, INDEX, torch.float64, engine="triton"),
            r"dtype of x_t is torch.float64",
        ),
        (lambda: noised_rows(NO_IMAGES, INDEX, INDEX, engine="triton"), r"images has 0 entries, expected at least 1"),
        (
            lambda: noised_rows(replace(TABLE, seed_I=TABLE.seed_I[1:]), INDEX, INDEX, engine="triton"),
            r"seed_I has shape \(4,\), expected \(5,\)",
        ),
        (
            lambda: noised_rows(BIG, INDEX.to("meta"), INDEX.to("meta"), engine="triton"),
            r"latents reaches element offset 2147483648, expected less than 2147483648",
        ),
    ],
)
def test_arguments_that_do_not_fit(call: object, message: str):
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_meta_tensors_and_compilers_see_through():
    _, table = latents(16, 2)
    image_G, patch_index_G = rows_of(table, 1)

    def both(v_GZ: Tensor, latents: Tensor) -> tuple[Tensor, ...]:
        rows = noised_rows(replace(table, latents=latents), image_G, patch_index_G, engine="triton")
        target = KeyedTarget(rows.x_t_GZ, table.seed_I[image_G.clamp_min(0)], patch_index_G)
        return flow_losses(v_GZ, target, rows.real_G.float(), engine="triton")[:2]

    v_GZ = normal(len(image_G), 64).requires_grad_()
    values = both(v_GZ, table.latents)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)(v_GZ, table.latents)
    assert all(torch.equal(a, b) for a, b in zip(compiled, values, strict=True))
    gradients = [torch.autograd.grad(x[0].sum(), v_GZ)[0] for x in (compiled, values)]
    assert torch.equal(*gradients)
    weight_G = torch.ones(7, device="meta")
    meta = flow_losses(torch.zeros(7, 64, device="meta"), torch.zeros(7, 64, device="meta"), weight_G, engine="triton")
    assert meta.total_G.shape == meta.mse_G.shape == (7,) and meta.distance_G is None
