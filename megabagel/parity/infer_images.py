"""Pictures of an `infer_*` case: every state, velocity, branch and pixel."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabagel.inference.pictures import from_latent
from megabagel.inference.programs import (
    Canvas,
    DrawSettings,
    Program,
    Session,
    Step,
    View,
    denoise,
    official_noise,
)
from megabagel.parity.comparisons import compare
from megabagel.parity.infer_format import grid_of
from megabagel.parity.infer_state import SubCase
from megabagel.sampling.guidance import Guidance
from megabagel.sequence.patches import unpatchify


def compare_image(sub: SubCase, number: int, image: dict[str, Any]) -> None:
    """Sample a picture (or the pictures of a batch) and compare everything about it."""
    name, kwargs, model = f"img{number}", image["kwargs"], sub.config.model
    settings = DrawSettings(
        kwargs["num_timesteps"],
        kwargs["timestep_shift"],
        Guidance(
            kwargs["cfg_text_scale"],
            kwargs["cfg_img_scale"],
            tuple(kwargs["cfg_interval"]),
            kwargs["cfg_renorm_type"],
            kwargs["cfg_renorm_min"],
        ),
        kwargs.get("enable_taylorseer", False),
    )
    ids, noise, at, canvases = (
        sub.tensors[f"{name}.latent_position_ids"],
        sub.tensors[f"{name}.init_noise"],
        0,
        [],
    )
    _seed_rule(sub, number, [length - 2 for length in image["seqlens"]], noise)
    for index, length in enumerate(image["seqlens"]):
        mine = slice(at, at + length - 2)
        rows, cols = grid_of(ids[mine], model.latent_grid, model.interpolate_pos)
        canvases.append(Canvas(rows, cols, noise[mine], *_contexts(sub, number, image, index)))
        at += length - 2
    if "output_size" in sub.about:
        stride = sub.config.model.latent_stride
        sizes = [canvases[0].rows * stride, canvases[0].cols * stride]
        sub.fact(f"{name} output_size", sizes, sub.about["output_size"])
    steps, final = sub.run(denoise(sub.sessions[0], canvases, settings, joint=len(canvases) > 1))
    sub.check(f"{name}.expect.final_tokens", torch.cat(final))
    _steps(sub, name, image, canvases, steps, settings)
    _decoded(sub, number, canvases, final)


def _seed_rule(sub: SubCase, number: int, sizes: list[int], noise: Tensor) -> None:
    """The start noise is that of the seed: one generator for all pictures of a batch, or a seed for each."""
    seeds, width = sub.about.get("noise_seed"), sub.config.model.latent_dim
    if seeds is None:
        return
    if isinstance(seeds, list) and len(sizes) > 1 and len(seeds) == len(sizes):
        drawn = torch.cat([official_noise(seed, n, width) for seed, n in zip(seeds, sizes, strict=True)])
    else:
        generator = torch.Generator().manual_seed(seeds[number] if isinstance(seeds, list) else seeds)
        drawn = torch.cat([torch.randn(n, width, generator=generator) for n in sizes])
    sub.found.append(compare(f"{sub.tag}/img{number} seed rule", drawn, noise, sub.gates.exact))


def _contexts(sub: SubCase, number: int, image: dict[str, Any], index: int) -> tuple[View, View, View]:
    """Main, text-free and image-free context of a picture; positions and lengths are compared."""
    session, named = sub.sessions[index], sub.context_of[index]
    views = []
    for key, prefix in (("gen", ""), ("cfg_text", "cfg_text_"), ("cfg_img", "cfg_img_")):
        view = session.view(named[tuple(image["contexts"][key] or ())])
        if key == "cfg_text" and image.get("cfg_text_cache_is_none"):
            view = View(np.zeros(0, np.int64), image["cfg_text_position"][index])
        for fact, ours in (("kv_len", len(view.rows)), ("position", view.position)):
            theirs = image.get(prefix + fact)
            sub.fact(f"img{number} {prefix}{fact}[{index}]", ours, theirs[index] if theirs else None)
        views.append(view)
    return views[0], views[1], views[2]


def _steps(
    sub: SubCase, name: str, image: dict[str, Any], canvases: list[Canvas], steps: list[Step], settings: DrawSettings
) -> None:
    """States, velocities and branches of every step."""
    if not steps:
        return
    sub.fact(f"{name} timesteps", [step.t for step in steps], image["timesteps"])
    scales = [settings.guidance.scales(step.t) for step in steps]
    sub.fact(f"{name} scales", scales, image["scales"])
    sub.check(f"{name}.expect.x_t", torch.stack([torch.cat(step.x_t) for step in steps]))
    sub.check(f"{name}.expect.v_t", torch.stack([torch.cat(step.velocity) for step in steps]))
    for key, branch in (("v_main", "main"), ("v_text", "text_free"), ("v_img", "image_free")):
        at = image.get(f"{key}_steps")
        if f"{name}.expect.{key}" in sub.tensors:
            chosen = steps if at is None else [steps[i] for i in at]
            found = [_branch(sub, step, branch, canvases) for step in chosen]
            sub.check(f"{name}.expect.{key}", torch.stack(found))


def _branch(sub: SubCase, step: Step, name: str, canvases: list[Canvas]) -> Tensor:
    """A branch's velocity at a step; one that guidance did not need is evaluated for the comparison alone."""
    if name in step.branches[0]:
        return torch.cat([one[name] for one in step.branches])
    alone = [replace(canvas, noise=x, main=getattr(canvas, name)) for canvas, x in zip(canvases, step.x_t, strict=True)]
    return torch.cat(sub.run(_velocity(sub.sessions[0], alone, step.t))[1])


def _decoded(sub: SubCase, number: int, canvases: list[Canvas], final: list[Tensor]) -> None:
    """Pixels of the pictures where the case has an autoencoder."""
    patch, name = sub.config.model.latent_patch, f"img{number}"
    for canvas, tokens in zip(canvases, final, strict=True):
        latent = unpatchify(tokens, canvas.rows, canvas.cols, patch)
        sub.check(f"{name}.expect.final_latent", latent[None])
        if sub.codec is None:
            continue
        pixels = sub.codec.decode(latent[None])
        sub.check(f"{name}.expect.latent", latent[None])
        sub.check(f"{name}.expect.decoded", pixels)
        sub.pictures.append(from_latent(tokens, canvas.rows, canvas.cols, patch, sub.codec))
        _levels(sub, number)


def _levels(sub: SubCase, number: int) -> None:
    """The picture's levels: exact where the official value is not within its tolerance of the next level."""
    name, decoded = f"out{number}.uint8", sub.tensors.get(f"img{number}.expect.decoded")
    if name not in sub.tensors or decoded is None:
        return
    level = (decoded[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1) * 255
    reach = 255 / 2 * (sub.gates.block.limit or 0) * float(decoded.abs().max())
    open_hw3 = ((level - level.round()).abs() <= reach) & (level > reach) & (level < 255 - reach)
    ours, theirs = (torch.where(open_hw3, 0, x) for x in (torch.from_numpy(sub.pictures[-1]), sub.tensors[name]))
    left = f" without {int(open_hw3.sum())} of {open_hw3.numel()} at a level's border" if open_hw3.any() else ""
    sub.found.append(compare(f"{sub.tag}/{name}{left}", ours, theirs, sub.gates.exact))


def _velocity(session: Session, canvases: list[Canvas], t: float) -> Program[list[Tensor]]:
    """The plain velocity of every canvas's main context at its noise and timestep `t`."""
    from megabagel.inference.programs import _Drawing

    drawings = [_Drawing(session, canvas, taylorseer=False) for canvas in canvases]
    parts = tuple(p for d, c in zip(drawings, canvases, strict=True) for p in d.parts(c.noise, t, (False, False)))
    results = yield parts
    for drawing in drawings:
        drawing.close()
    return [result.velocities[0].cpu() for result in results]
