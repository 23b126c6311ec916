"""Latent images, keyed targets and flow losses. Letters: G gen rows, Z latent features, I images."""

from collections.abc import Sequence

import torch
from megabagel_kernels.flow import KeyedTarget, LatentImages, Reference, flow_losses
from torch import Tensor

from tests.kernels.case import Case, Numbers
from tests.kernels.guards import guarded

CHANNELS, PATCH, FEATURES = 16, 2, 64
"""Of BAGEL's latents."""


def latents(
    numbers: Numbers, sizes: Sequence[tuple[int, int]], dtype: torch.dtype, padding: int = 7
) -> tuple[LatentImages, Tensor, Tensor]:
    """Images of the given heights and widths in one buffer; for every token and some padding, its image and patch."""
    of = {"device": numbers.device}
    count = torch.tensor([CHANNELS * height * width for height, width in sizes])
    images = LatentImages(
        numbers.normal(int(count.sum()), key="latents", dtype=dtype),
        (count.cumsum(0) - count).to(**of), *(torch.tensor(side, **of) for side in zip(*sizes, strict=True)),
        numbers.normal(len(sizes), key="times", dtype=torch.float32).sigmoid(),
        numbers.integers(2**62, len(sizes), key="image seeds"), CHANNELS, PATCH,
    )  # fmt: skip
    tokens = (count // FEATURES).tolist()
    image_G = torch.cat([torch.arange(len(sizes)).repeat_interleave(torch.tensor(tokens)), torch.full((padding,), -1)])
    patch_index_G = torch.cat([*(torch.arange(number) for number in tokens), torch.arange(padding)])
    return images, image_G.to(**of), patch_index_G.to(**of)


def keyed_target(numbers: Numbers, rows: int, width: int, dtype: torch.dtype) -> KeyedTarget:
    """Clean tokens in rows that are not contiguous, seeds and patch indices."""
    x0_GZ = guarded(numbers.normal(rows, width, key="x0", dtype=dtype))
    return KeyedTarget(
        x0_GZ, numbers.integers(2**62, rows, key="seeds"), numbers.integers(4096, rows, key="patch indices")
    )


def losses(numbers: Numbers, rows: int, width: int, dtype: torch.dtype) -> list[Case]:
    """Losses to a keyed target and to a stored velocity, without and with a reference model; some weights are 0."""
    keyed = keyed_target(numbers, rows, width, dtype)
    stored = guarded(numbers.normal(rows, width, key="velocity", dtype=torch.float32))
    weight_G, held_G = (numbers.normal(rows, key=key, dtype=torch.float32).abs() for key in ("weight", "lambda"))
    weight_G = weight_G * (torch.arange(rows, device=numbers.device) % 3 != 1)
    held = Reference(guarded(numbers.normal(rows, width, key="reference velocity", dtype=dtype)), held_G)
    v_GZ = 2 * numbers.normal(rows, width, key="v", dtype=dtype)
    targets = {"flow loss": keyed, "flow loss to a stored velocity": stored}
    return [
        _loss(name + ending, target, weight_G, reference, v_GZ)
        for name, target in targets.items()
        for ending, reference in (("", None), (", with a reference", held))
    ]


def _loss(name: str, target: Tensor | KeyedTarget, weight_G: Tensor, reference: Reference | None, v_GZ: Tensor) -> Case:
    def total(v_GZ: Tensor, engine: str) -> Tensor:
        return flow_losses(v_GZ, target, weight_G, reference, engine=engine).total_G

    return Case(name, lambda v: total(v, "triton"), lambda v: total(v, "torch"), [v_GZ])
