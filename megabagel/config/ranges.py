"""Allowed range of every number in the config, independent of other fields. Each numeric key is in exactly one row."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megabagel.config.schema import Config


@dataclass(frozen=True)
class Range:
    """A range of numbers and the keys that have it."""

    text: str
    """Description of the range in messages."""
    holds: Callable[[float], bool]
    """Whether a number is in the range."""
    keys: tuple[str, ...]
    """Dotted keys; `*` stands for every entry of a list."""


def _under(section: str, names: str) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names.split())


RANGES = (
    Range(
        "at least 1",
        lambda x: x >= 1,
        (
            *_under("model", "layers hidden heads kv_heads head_dim ffn vocab latent_patch latent_grid"),
            *_under("model.vit", "layers hidden heads ffn patch grid"),
            *_under("model.vae", "channels downsample width width_multipliers.* res_blocks"),
            *_under("parallel", "tp pp vpp cp chunk"),
            *_under("data", "min_tokens max_tokens max_sample_tokens lookahead prefetch decode_threads"),
            *_under("data.vae_resize", "max_size min_size max_pixels"),
            *_under("data.vit_resize", "max_size min_size max_pixels"),
            *_under("train", "steps packs_per_step spike_window max_rollbacks val_packs"),
            *_under("telemetry", "log_every sample_size.* sample_steps"),
        ),
    ),
    Range(
        "at least 0",
        lambda x: x >= 0,
        (
            "parallel.layer_split.*",
            "data.sources.*.weight",
            "data.val_sources.*.weight",
            *_under("train", "seed min_lr warmup weight_decay ce_weight mse_weight spike_warmup val_every"),
            "train.recompute_check_every",
            "data.workers",
            "reward.constraint",
            *_under("checkpoint", "every keep keep_every"),
            *_under("telemetry", "sample_every sample_guidance straggler_steps"),
        ),
    ),
    Range(
        "greater than 0",
        lambda x: x > 0,
        (
            *_under("model", "norm_eps rope_base init_std vit.norm_eps vae.scale"),
            *_under("train", "lr eps clip timestep_shift spike_sigma"),
            *_under("run", "start_timeout timeout heartbeat_timeout"),
            "data.worker_timeout",
            "telemetry.peak_tflops",
        ),
    ),
    Range("at least 1", lambda x: x >= 1, ("telemetry.straggler_ratio",)),
    Range("from 0 to 1", lambda x: 0 <= x <= 1, _under("data", "drop_text drop_vit drop_latent")),
    Range("at least 0 and less than 1", lambda x: 0 <= x < 1, _under("train", "beta1 beta2 ema")),
    Range("any number", lambda x: True, ("model.vae.shift", "reward.floor")),
)


MOST: dict[str, float] = {
    "model.layers": 2**12,
    "model.vit.layers": 2**12,
    "model.latent_grid": 2**12,
    "model.vit.grid": 2**12,
    "model.latent_patch": 2**8,
    "model.vit.patch": 2**10,
    "model.hidden": 2**20,
    "model.ffn": 2**22,
    "model.vocab": 2**24,
    "model.head_dim": 2**12,
    "model.vit.hidden": 2**20,
    "model.vit.ffn": 2**22,
    "model.vae.res_blocks": 2**8,
    "model.vae.channels": 2**16,
    "model.vae.width": 2**16,
    "parallel.tp": 2**20,
    "parallel.pp": 2**20,
    "parallel.cp": 2**20,
    "parallel.vpp": 2**12,
    "data.lookahead": 2**20,
    "data.prefetch": 2**10,
    "data.workers": 2**10,
    "data.decode_threads": 2**10,
    "data.sources.*.weight": 1e12,
    "data.val_sources.*.weight": 1e12,
    "train.packs_per_step": 2**24,
    "train.val_packs": 2**24,
    "train.seed": 2**63 - 1,
    "train.spike_window": 2**20,
    "telemetry.sample_steps": 2**16,
    "telemetry.straggler_steps": 2**20,
    "run.start_timeout": 1e7,
    "run.timeout": 1e7,
    "run.heartbeat_timeout": 1e7,
    "data.worker_timeout": 1e7,
}
"""Upper bounds far beyond any real run, so that a typing error gives a message instead of exhausting memory or time."""
MOST_OF_ALL = 2**40
"""Upper bound of every other integer."""


def out_of_range(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, message) of every number outside its range."""
    for allowed in RANGES:
        for wanted in allowed.keys:
            most = MOST.get(wanted, MOST_OF_ALL)
            for key, value in numbers(config, wanted):
                if not allowed.holds(value):
                    yield key, f"{key} = {value}: expected {allowed.text}"
                elif value > most and (isinstance(value, int) or wanted in MOST):
                    yield key, f"{key} = {value}: expected {allowed.text} and at most {most}"


def numbers(node: Any, wanted: str, path: str = "") -> Iterator[tuple[str, float]]:
    """Yield (dotted key, number) of every number that the key pattern `wanted` matches; optional fields may be unset.

    Args:
        node: a config, a section of it or a list in it.
        wanted: dotted key relative to `node`; `*` stands for every entry of a list.
        path: dotted key of `node`.
    """
    name, _, rest = wanted.partition(".")
    entries = enumerate(node) if name == "*" else [(name, getattr(node, name))]
    for label, value in entries:
        key = f"{path}.{label}" if path else str(label)
        if value is None:
            continue
        if rest:
            yield from numbers(value, rest, key)
        else:
            yield key, value
