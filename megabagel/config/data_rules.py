"""Rules between fields: data sources, packing, image sizes, learning-rate schedule, start of a run, sample images.

The docstring of a rule is the reason in the error message (see `config.rules`).
"""

import math
from collections.abc import Iterator
from pathlib import Path

from megabagel.config.rules import nearest_multiples, rule
from megabagel.config.schema import Config, ResizeConfig

GENERATES = frozenset({"t2i", "edit", "video", "interleave", "reward", "reconstruct"})
"""Tasks that need model.visual_gen."""
LOOKS = frozenset({"i2t", "edit", "interleave", "reconstruct"})
"""Tasks that need model.visual_und."""

# The mixture


@rule("data.sources")
def mixture_has_a_source(c: Config) -> Iterator[str]:
    """A run draws its samples from at least one source."""
    if not c.data.sources:
        yield "List one, for example {name: pairs, path: pairs-*.tar, task: t2i}."


@rule("data.sources.*.name", "data.sources.*.path")
def sources_have_name_and_path(c: Config) -> Iterator[str]:
    """Every source has a name and a glob of shards."""
    for i, source in enumerate(c.data.sources):
        yield from (
            f"data.sources.{i}.{field} = ''; give it one." for field in ("name", "path") if not getattr(source, field)
        )


@rule("data.sources.*.name")
def source_names_differ(c: Config) -> Iterator[str]:
    """Every source has a name of its own."""
    first: dict[str, int] = {}
    for i, source in enumerate(c.data.sources):
        if source.name and first.setdefault(source.name, i) != i:
            yield f"data.sources.{i}.name = {source.name!r} is that of data.sources.{first[source.name]}; rename one."


@rule("data.sources.*.weight")
def some_source_has_weight(c: Config) -> Iterator[str]:
    """Samples are drawn in proportion to the weights of the sources."""
    if c.data.sources and not any(source.weight for source in c.data.sources):
        yield "data.sources.*.weight = 0 in all of them; give at least one a weight above 0."


@rule("model.visual_gen", "data.sources.*.task")
def generating_tasks_have_a_branch(c: Config) -> Iterator[str]:
    """Tasks that generate images need the latent path."""
    for i, source in enumerate(c.data.sources):
        if source.task in GENERATES and not c.model.visual_gen:
            yield f"Set model.visual_gen to true, or drop the source with data.sources.{i}.task = {source.task!r}."


@rule("model.visual_und", "data.sources.*.task")
def looking_tasks_have_a_branch(c: Config) -> Iterator[str]:
    """Tasks that look at images need the ViT tower."""
    for i, source in enumerate(c.data.sources):
        if source.task in LOOKS and not c.model.visual_und:
            yield f"Set model.visual_und to true, or drop the source with data.sources.{i}.task = {source.task!r}."


# Packing


@rule("data.min_tokens", "data.max_tokens")
def window_is_not_empty(c: Config) -> Iterator[str]:
    """A pack is closed at min_tokens and never exceeds max_tokens."""
    if c.data.min_tokens > c.data.max_tokens:
        yield f"Set data.min_tokens to {c.data.max_tokens} or less."


@rule("data.max_sample_tokens", "data.max_tokens")
def samples_fit_a_pack(c: Config) -> Iterator[str]:
    """A sample is never cut, so it fits into one pack."""
    if c.data.max_sample_tokens is not None and c.data.max_sample_tokens > c.data.max_tokens:
        yield f"Set data.max_sample_tokens to {c.data.max_tokens} or less."


# Image sizes


@rule("data.vae_resize.min_size", "data.vae_resize.max_size")
def vae_sizes_are_ordered(c: Config) -> Iterator[str]:
    """The smaller bound of image sides comes first."""
    yield from _ordered("data.vae_resize", c.data.vae_resize)


@rule("data.vit_resize.min_size", "data.vit_resize.max_size")
def vit_sizes_are_ordered(c: Config) -> Iterator[str]:
    """The smaller bound of image sides comes first."""
    yield from _ordered("data.vit_resize", c.data.vit_resize)


def _ordered(key: str, resize: ResizeConfig) -> Iterator[str]:
    if resize.min_size > resize.max_size:
        yield f"Set {key}.min_size to {resize.max_size} or less."


@rule("data.latents")
def latents_name_a_cache(c: Config) -> Iterator[str]:
    """A latent cache is the folder that `megabagel data latents` wrote, which has a manifest.json."""
    if c.data.latents is not None and not (Path(c.data.latents) / "manifest.json").is_file():
        yield f"Write it with `megabagel data latents CONFIG {c.data.latents}`, or set data.latents to null."


_STRIDE = ("model.latent_patch", "model.vae.downsample")


@rule("data.vae_resize.max_size", "model.latent_grid", *_STRIDE, "model.visual_gen", "model.interpolate_pos")
def latent_grid_covers_images(c: Config) -> Iterator[str]:
    """The position table has a row for every latent token, latent_patch x downsample pixels a side."""
    side = _tokens_per_side(c.data.vae_resize.max_size, c.model.latent_stride)
    if c.model.visual_gen and not c.model.interpolate_pos and side > c.model.latent_grid:
        limit = c.model.latent_grid * c.model.latent_stride
        yield f"Set model.latent_grid to {side} or more, or data.vae_resize.max_size to {limit} or less."


@rule("data.vit_resize.max_size", "model.vit.grid", "model.vit.patch", "model.visual_und", "model.interpolate_pos")
def vit_grid_covers_images(c: Config) -> Iterator[str]:
    """The position tables have a row for every patch."""
    side = _tokens_per_side(c.data.vit_resize.max_size, c.model.vit.patch)
    if c.model.visual_und and not c.model.interpolate_pos and side > c.model.vit.grid:
        limit = c.model.vit.grid * c.model.vit.patch
        yield f"Set model.vit.grid to {side} or more, or data.vit_resize.max_size to {limit} or less."


_WINDOW = ("data.max_tokens", "data.max_sample_tokens", "data.sources.*.task")


@rule("data.vae_resize.min_size", "data.vae_resize.max_pixels", *_STRIDE, *_WINDOW)
def samples_hold_a_generated_image(c: Config) -> Iterator[str]:
    """A sample holds at least one image of the smallest size and its two marks, or every one would be skipped."""
    yield from _holds_image(c, GENERATES, "data.vae_resize", c.data.vae_resize, c.model.latent_stride)


@rule("data.vit_resize.min_size", "data.vit_resize.max_pixels", "model.vit.patch", *_WINDOW)
def samples_hold_a_seen_image(c: Config) -> Iterator[str]:
    """A sample holds at least one image of the smallest size and its two marks, or every one would be skipped."""
    yield from _holds_image(c, LOOKS, "data.vit_resize", c.data.vit_resize, c.model.vit.patch)


def _holds_image(c: Config, tasks: frozenset[str], key: str, resize: ResizeConfig, stride: int) -> Iterator[str]:
    limit = c.data.max_sample_tokens or c.data.max_tokens
    tokens = round(resize.min_size / stride) ** 2 + 2
    # Images above max_pixels shrink below min_size, by how much depends on the image.
    bounded = resize.min_size**2 <= resize.max_pixels
    if bounded and tokens > limit and any(source.task in tasks for source in c.data.sources):
        side = math.isqrt(max(limit - 2, 0)) * stride
        yield f"It takes {tokens} tokens; set {key}.min_size to {side} or less, or allow longer samples."


def _tokens_per_side(pixels: int, stride: int) -> int:
    """Most tokens per side: sides are rounded to multiples of the stride, possibly upwards."""
    return -(-pixels // stride)


# Schedule, start and reports


@rule("train.schedule", "train.lr", "train.min_lr")
def cosine_falls(c: Config) -> Iterator[str]:
    """The cosine schedule falls from lr to min_lr."""
    if c.train.schedule == "cosine" and c.train.min_lr > c.train.lr:
        yield f"Set train.min_lr to {c.train.lr} or less."


@rule("train.schedule", "train.warmup", "train.steps")
def warmup_ends_before_the_run(c: Config) -> Iterator[str]:
    """The cosine schedule runs between the end of the warm-up and the last step."""
    if c.train.schedule == "cosine" and c.train.warmup >= c.train.steps:
        yield f"Set train.warmup to {c.train.steps - 1} or less."


@rule("run.resume")
def resume_names_a_folder(c: Config) -> Iterator[str]:
    """A run resumes from `auto`, `none` or the folder of a checkpoint."""
    if c.run.resume not in ("auto", "none") and not Path(c.run.resume).is_dir():
        yield "There is no such folder; mend the path or use auto."


@rule("run.init_from")
def init_names_a_checkpoint(c: Config) -> Iterator[str]:
    """A fresh start takes its weights from the folder of a complete checkpoint, which has a manifest.json."""
    if c.run.init_from is not None and not (Path(c.run.init_from) / "manifest.json").is_file():
        yield "Name an imported checkpoint or RUN/checkpoints/step_00000100, or null for random weights."


@rule("run.init_from", "run.resume")
def init_is_for_fresh_starts(c: Config) -> Iterator[str]:
    """A run that goes on from the checkpoint named by resume has its weights from there."""
    if c.run.init_from is not None and c.run.resume not in ("auto", "none"):
        yield "Pick one: set run.init_from to null, or run.resume to auto or none."


@rule("telemetry.sample_every", "telemetry.prompts", "telemetry.edits", "telemetry.questions")
def samples_are_listed(c: Config) -> Iterator[str]:
    """Samples are made from prompts, edits and questions."""
    telemetry = c.telemetry
    if telemetry.sample_every and not (telemetry.prompts or telemetry.edits or telemetry.questions):
        yield "List telemetry.prompts (or edits, questions), or set telemetry.sample_every to 0."


@rule("telemetry.sample_every", "telemetry.prompts", "telemetry.edits", "model.visual_gen")
def samples_have_a_branch(c: Config) -> Iterator[str]:
    """Sample images are made by the latent path."""
    if c.telemetry.sample_every and (c.telemetry.prompts or c.telemetry.edits) and not c.model.visual_gen:
        yield "Set model.visual_gen to true, leave out telemetry.prompts and edits, or set telemetry.sample_every to 0."


@rule("telemetry.sample_every", "telemetry.questions", "telemetry.edits", "model.visual_und", "model.visual_gen")
def questions_see_images(c: Config) -> Iterator[str]:
    """Questions and edits show images to the model."""
    shown = c.telemetry.questions or c.telemetry.edits
    if c.telemetry.sample_every and shown and not (c.model.visual_und or c.model.visual_gen):
        yield "Set model.visual_und or visual_gen to true, or leave out telemetry.questions and edits."


@rule("telemetry.sample_every", "telemetry.sample_size", *_STRIDE)
def sample_size_is_whole_tokens(c: Config) -> Iterator[str]:
    """Sides of sample images are multiples of latent_patch x downsample pixels."""
    stride = c.model.latent_stride
    if c.telemetry.sample_every:
        for i, pixels in enumerate(c.telemetry.sample_size):
            if pixels % stride:
                yield f"Set telemetry.sample_size.{i} to {nearest_multiples(pixels, stride)}."


@rule("telemetry.sample_every", "telemetry.sample_size", "model.latent_grid", *_STRIDE, "model.interpolate_pos")
def latent_grid_covers_samples(c: Config) -> Iterator[str]:
    """Sample images fit the position table of latent tokens."""
    side = _tokens_per_side(max(c.telemetry.sample_size), c.model.latent_stride)
    if c.telemetry.sample_every and not c.model.interpolate_pos and side > c.model.latent_grid:
        limit = c.model.latent_grid * c.model.latent_stride
        yield f"Set model.latent_grid to {side} or more, or both sides of sample_size to {limit} or less."
