"""Errors to plant in inference: each replaces one function by one that is wrong in one way."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

Patch = pytest.MonkeyPatch


def interval_includes_its_start(patch: Patch) -> None:
    from megabagel.sampling.guidance import Guidance

    def scales(self: Any, t: Any) -> tuple[float, float]:
        lo, hi = (np.float32(end) for end in self.interval)
        return (self.text_scale, self.image_scale) if lo <= np.float32(t) <= hi else (1.0, 1.0)

    patch.setattr(Guidance, "scales", scales)


def text_channel_after_the_images(patch: Patch) -> None:
    from megabagel.inference import programs

    right = programs.guide

    def guide(v: Tensor, a: Any, b: Any, scales: Any, how: Any) -> Tensor:
        return right(v, a, b, scales, dataclasses.replace(how, renorm=how.renorm.removeprefix("text_")))

    patch.setattr(programs, "guide", guide)


def channel_before_the_images(patch: Patch) -> None:
    from megabagel.inference import programs

    right, turned = programs.guide, {"channel": "text_channel"}

    def guide(v: Tensor, a: Any, b: Any, scales: Any, how: Any) -> Tensor:
        return right(v, a, b, scales, dataclasses.replace(how, renorm=turned.get(how.renorm, how.renorm)))

    patch.setattr(programs, "guide", guide)


def _renormed(patch: Patch, factor: Any) -> None:
    from megabagel.sampling import guidance

    def renormed(guided: Tensor, v: Tensor, how: Any) -> Tensor:
        return guided * factor(guided, v, how)

    patch.setattr(guidance, "_renormed", renormed)


def global_norm_per_token(patch: Patch) -> None:
    _renormed(
        patch, lambda a, v, how: (v.norm(dim=1, keepdim=True) / a.norm(dim=1, keepdim=True)).clamp(how.renorm_min, 1)
    )


def renormed_upwards(patch: Patch) -> None:
    def factor(a: Tensor, v: Tensor, how: Any) -> Tensor:
        dims = {} if how.renorm == "global" else {"dim": 1, "keepdim": True}
        return (v.norm(**dims) / (a.norm(**dims) + 1e-8)).clamp(how.renorm_min)

    _renormed(patch, factor)


def _segments(patch: Patch, change: Any) -> None:
    from megabagel.inference import programs

    right = programs.segment

    def segment(*args: Any, **options: Any) -> Any:
        found = right(*args, **options)
        return change(found) if found.grid else found

    patch.setattr(programs, "segment", segment)


def image_positions_count_up(patch: Patch) -> None:
    _segments(patch, lambda s: dataclasses.replace(s, position=s.position + np.arange(len(s.position))))


def images_are_causal(patch: Patch) -> None:
    _segments(patch, lambda s: dataclasses.replace(s, causal=True))


def ends_of_images_by_the_generation_expert(patch: Patch) -> None:
    """The start token runs on zeros as a latent row would: the understanding expert never sees its id."""
    _segments(patch, lambda s: dataclasses.replace(s, ids=np.zeros_like(s.ids)))


def clean_latents_at_one(patch: Patch) -> None:
    from megabagel.inference import runner

    right = runner.images_of
    patch.setattr(runner, "images_of", lambda part: [(k, g, v, t or 1.0) for k, g, v, t in right(part)])


def text_free_at_the_position_of_main(patch: Patch) -> None:
    from megabagel.inference.programs import Canvas, View

    right = Canvas.__init__

    def init(self: Any, rows: int, cols: int, noise: Tensor, main: Any, text_free: Any, image_free: Any) -> None:
        right(self, rows, cols, noise, main, View(text_free.rows, main.position), image_free)

    patch.setattr(Canvas, "__init__", init)


def text_starts_one_later(patch: Patch) -> None:
    from megabagel.inference import programs
    from megabagel.parity import infer_texts

    right = programs.decode

    def decode(session: Any, context: Any, settings: Any) -> Any:
        moved = dataclasses.replace(session)
        view = session.view(context)
        moved.view = lambda _: programs.View(view.rows, view.position + 1)
        return right(moved, context, settings)

    patch.setattr(infer_texts, "decode", decode)


def taylorseer_every_fourth(patch: Patch) -> None:
    patch.setattr("megabagel.sampling.taylorseer.INTERVAL", 4)


def norm_after_rotation(patch: Patch) -> None:
    from megabagel_kernels.rms_norm.torch import rms_norm

    from megabagel.model.kernels import TORCH
    from megabagel.model.positions import apply_rope

    def qk_norm_rope(und: Tensor, gen: Tensor, und_H: Any, gen_H: Any, eps: float, rope: Any) -> Tensor:
        turned = apply_rope(torch.cat([und, gen]), rope.cos_TH, rope.sin_TH)
        und, gen = turned.split([len(und), len(gen)])
        return torch.cat([rms_norm(und, und_H, eps), rms_norm(gen, gen_H, eps)])

    wrong = dataclasses.replace(TORCH, qk_norm_rope=qk_norm_rope)
    patch.setattr("megabagel.inference.build.choose_kernels", lambda config: wrong)


def latent_channels_first(patch: Patch) -> None:
    def latent_tokens(cells_Chw: Tensor, p: int) -> Tensor:
        channels, height, width = cells_Chw.shape
        grid = cells_Chw.reshape(channels, height // p, p, width // p, p)
        return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * p * p)

    patch.setattr("megabagel.parity.infer_ops.latent_tokens", latent_tokens)


def steps_not_shifted(patch: Patch) -> None:
    from megabagel.inference import programs

    right = programs.timestep_grid
    patch.setattr(programs, "timestep_grid", lambda points, shift: right(points, 1.0))


def decoding_misses_the_last_token(patch: Patch) -> None:
    """A decoded token does not see the token before it."""
    from megabagel.inference import segments

    right = segments.mask_codes

    def mask_codes(parts: Any) -> Any:
        if len(parts) == 1 and parts[0].logits and len(parts[0].past) > 2:
            parts = [dataclasses.replace(parts[0], past=parts[0].past[:-1])]
        return right(parts)

    patch.setattr(segments, "mask_codes", mask_codes)
