"""Every rule is broken alone, by the smallest change, and names its keys."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabagel.config.checks import RULES, check_world, violations
from megabagel.config.ranges import RANGES
from megabagel.config.schema import Config, SourceConfig
from megabagel.config.typed import known_keys
from megabagel.errors import UserError
from tests.support.config_tree import VALID, change

FLUX = {"model.vae.codec": "flux", "model.vae.path": __file__}  # any file that exists

NO_UND = {"model.visual_und": False, "data.sources.1.task": "text"}

STORED = str(Path(__file__).parent / "checkpoint")
"""A folder with a manifest.json, which is all that rules look for."""

BREAKS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    # rule, change to the valid config, what its message has to say
    ("hidden_splits_into_heads", {"model.hidden": 132, "model.heads": 8}, ("model.heads to 6", "128 or 136")),
    ("head_dim_is_even", {"model.head_dim": 33}, ("33",)),
    ("head_dim_is_even", {"model.hidden": 60}, ("15",)),
    ("query_heads_share_kv_heads", {"model.kv_heads": 3}, ("model.heads to 3 or 6", "model.kv_heads to 2")),
    ("hidden_fits_position_tables", {"model.hidden": 130, "model.head_dim": 32}, ("128 or 132",)),
    ("heads_split_over_tp", {"parallel.tp": 4}, ("model.kv_heads to 4,", "parallel.tp to 2")),
    ("ffn_splits_over_tp", {"parallel.tp": 2, "model.ffn": 255}, ("254 or 256",)),
    ("vocab_splits_over_tp", {"parallel.tp": 2, "model.vocab": 511}, ("510 or 512",)),
    ("chunk_splits_over_tp", {"parallel.tp": 2, "parallel.chunk": 63}, ("62 or 64",)),
    ("interleaving_needs_a_pipeline", {"parallel.vpp": 2}, ("parallel.pp to 2 or more",)),
    ("every_stage_has_a_layer", {"parallel.pp": 3, "parallel.vpp": 2}, ("model.layers to 6",)),
    ("layer_split_covers_the_model", {"parallel.layer_split": (2, 2)}, ("Found 2", "expected 1 with sum 4")),
    ("layer_split_covers_the_model", {"parallel.pp": 2, "parallel.layer_split": (2, 1)}, ("sum 3", "sum 4")),
    ("window_holds_a_chunk_per_rank", {"parallel.chunk": 256, "parallel.cp": 3}, ("data.max_tokens to 768",)),
    ("vit_hidden_splits_into_heads", {"model.vit.hidden": 98}, ("96 or 100", "model.vit.heads to 2")),
    ("blocks_codec_has_its_shape", {"model.vae.channels": 4}, ("channels to 16",)),
    ("blocks_codec_has_its_shape", {"model.vae.downsample": 16}, ("downsample to 8",)),
    ("flux_codec_has_weights", {"model.vae.codec": "flux"}, ("model.vae.path = None", "ae.safetensors")),
    ("flux_codec_has_weights", {**FLUX, "model.vae.path": "no/ae.safetensors"}, ("no/ae.safetensors",)),
    ("flux_levels_make_downsample", {**FLUX, "model.vae.width_multipliers": (1, 2)}, ("2 levels",)),
    ("flux_width_fits_group_norm", {**FLUX, "model.vae.width": 48}, ("32 or 64",)),
    ("mixture_has_a_source", {"data.sources": ()}, ("data.sources = ()",)),
    ("sources_have_name_and_path", {"data.sources.1.name": ""}, ("data.sources.1.name",)),
    ("sources_have_name_and_path", {"data.sources.2.path": ""}, ("data.sources.2.path",)),
    ("source_names_differ", {"data.sources.2.name": "pairs"}, ("data.sources.2.name = 'pairs'", "data.sources.0")),
    (
        "some_source_has_weight",
        {"data.sources.0.weight": 0.0, "data.sources.1.weight": 0.0},
        ("data.sources.*.weight",),
    ),
    (
        "generating_tasks_have_a_branch",
        {"model.visual_gen": False, "telemetry.sample_every": 0, "data.val_sources": ()},
        ("model.visual_gen = False", "data.sources.0.task = 't2i'"),
    ),
    ("looking_tasks_have_a_branch", {"model.visual_und": False}, ("data.sources.1.task = 'i2t'",)),
    ("held_out_loss_has_a_source", {"train.val_every": 5, "data.val_sources": ()}, ("train.val_every = 5",)),
    ("held_out_sources_have_name_and_path", {"data.val_sources.1.name": ""}, ("data.val_sources.1.name",)),
    ("held_out_sources_have_name_and_path", {"data.val_sources.1.path": ""}, ("data.val_sources.1.path",)),
    ("held_out_sources_have_name_and_path", {"data.val_sources.1.name": "held"}, ("is that of an earlier one",)),
    (
        "some_held_out_source_has_weight",
        {"data.val_sources.0.weight": 0.0, "data.val_sources.1.weight": 0.0},
        ("data.val_sources.*.weight",),
    ),
    ("held_out_tasks_have_a_branch", {"data.val_sources.0.task": "edit", **NO_UND}, ("data.val_sources.0.task",)),
    ("window_is_not_empty", {"data.min_tokens": 513}, ("data.min_tokens = 513", "512 or less")),
    ("samples_fit_a_pack", {"data.max_sample_tokens": 513}, ("data.max_sample_tokens = 513", "512 or less")),
    ("vae_sizes_are_ordered", {"data.vae_resize.min_size": 144}, ("data.vae_resize.min_size to 128",)),
    ("vit_sizes_are_ordered", {"data.vit_resize.min_size": 126}, ("data.vit_resize.min_size to 112",)),
    ("latent_grid_covers_images", {"model.latent_grid": 7}, ("model.latent_grid to 8", "max_size to 112")),
    ("latent_grid_covers_images", {"data.vae_resize.max_size": 120, "model.latent_grid": 7}, ("latent_grid to 8",)),
    ("vit_grid_covers_images", {"model.vit.grid": 7}, ("model.vit.grid to 8", "max_size to 98")),
    (
        "samples_hold_a_generated_image",
        {"data.vae_resize.min_size": 80, "data.max_sample_tokens": 26},
        ("27 tokens", "min_size to 64"),
    ),
    (
        "samples_hold_a_seen_image",
        {"data.vit_resize.min_size": 70, "data.max_sample_tokens": 26},
        ("27 tokens", "min_size to 56"),
    ),
    ("cosine_falls", {"train.schedule": "cosine", "train.min_lr": 0.1}, ("train.min_lr = 0.1", "0.001")),
    (
        "warmup_ends_before_the_run",
        {"train.schedule": "cosine", "train.warmup": 100},
        ("train.warmup to 99", "train.steps = 100"),
    ),
    ("resume_names_a_folder", {"run.resume": "no/such/step_00000100"}, ("run.resume = 'no/such/step_00000100'",)),
    ("latents_name_a_cache", {"data.latents": "no/such"}, ("data.latents = 'no/such'", "data latents CONFIG no/such")),
    ("init_names_a_checkpoint", {"run.init_from": "no/such"}, ("run.init_from = 'no/such'", "checkpoints/step_")),
    ("init_names_a_checkpoint", {"run.init_from": str(Path(__file__).parent)}, ("manifest.json", "null")),
    ("init_is_for_fresh_starts", {"run.init_from": STORED, "run.resume": STORED}, ("Pick one",)),
    ("something_learns", {"train.freeze": ("llm", "vit", "connector", "latent")}, ("'connector', 'latent')",)),
    ("something_learns", {"train.freeze": ("und", "latent", "llm")}, ("take a part out of train.freeze",)),
    (
        "something_learns",
        {"train.freeze": ("llm", "latent"), "model.visual_und": False, "data.sources.1.task": "text"},
        ("model.visual_und = False",),
    ),
    (
        "something_learns",
        {
            "train.freeze": ("llm", "vit", "connector"),
            "model.visual_gen": False,
            "data.sources.0.task": "text",
            "data.val_sources": (),
            "telemetry.sample_every": 0,
        },
        ("model.visual_gen = False",),
    ),
    ("frozen_parts_differ", {"train.freeze": ("vit", "llm", "vit")}, ("Remove the second vit",)),
    (
        "samples_are_listed",
        {"telemetry.prompts": (), "telemetry.edits": (), "telemetry.questions": ()},
        ("telemetry.prompts",),
    ),
    (
        "questions_see_images",
        {
            "model.visual_gen": False,
            "model.visual_und": False,
            "data.sources.0.task": "text",
            "data.sources.1.task": "text",
            "data.val_sources": (),
            "telemetry.prompts": (),
            "telemetry.edits": (),
        },
        ("Set model.visual_und or visual_gen to true",),
    ),
    (
        "samples_have_a_branch",
        {"model.visual_gen": False, "data.sources.0.task": "i2t", "data.val_sources.0.task": "text"},
        ("model.visual_gen = False", "telemetry.sample_every = 10"),
    ),
    ("sample_size_is_whole_tokens", {"telemetry.sample_size": (64, 100)}, ("telemetry.sample_size.1 to 96 or 112",)),
    ("latent_grid_covers_samples", {"telemetry.sample_size": (2048, 64)}, ("model.latent_grid to 128",)),
]

KEEPS: list[dict[str, Any]] = [
    {"model.head_dim": 32, "model.heads": 6, "model.hidden": 128},  # head_dim frees hidden from heads
    {"parallel.tp": 2, "parallel.chunk": 63, "parallel.sp": False},
    {"parallel.pp": 2, "parallel.vpp": 2, "parallel.layer_split": (0, 2, 2, 0)},  # a stage may have no layer if told so
    {"parallel.chunk": 256, "parallel.cp": 2},  # exactly the window
    {"model.visual_und": False, "data.sources.1.task": "text", "model.vit.hidden": 97, "parallel.tp": 2},
    {**FLUX, "model.vae.channels": 4},
    {"model.latent_grid": 8, "model.vit.grid": 8},  # exactly the largest image
    {"model.latent_grid": 2, "model.vit.grid": 2, "model.interpolate_pos": True},  # larger images share positions
    {"data.max_sample_tokens": 18},  # exactly the smallest image with its marks
    {"data.max_sample_tokens": 512, "data.min_tokens": 512},
    {"train.warmup": 500},  # a constant schedule may end in its warm-up
    {"run.resume": "none"},
    {"run.resume": str(Path(__file__).parent)},
    {"run.init_from": STORED},  # with resume = auto, where the run has no checkpoint yet
    {"run.init_from": STORED, "run.resume": "none"},
    {"train.freeze": ("llm", "vit", "latent")},
    {"train.freeze": ("llm", "connector", "latent")},
    {"train.freeze": ("llm", "vit", "connector")},
    {"train.freeze": ("llm", "und")},
    {"train.freeze": ("vit", "connector", "latent", "und")},  # the generation expert and the head learn
    {"telemetry.sample_every": 0, "telemetry.prompts": (), "telemetry.sample_size": (1, 1)},
]


def test_a_valid_config_breaks_nothing() -> None:
    assert violations(VALID) == []


@pytest.mark.parametrize("values", KEEPS, ids=str)
def test_legal_changes_break_nothing(values: dict[str, Any]) -> None:
    assert violations(change(VALID, values)) == []


@pytest.mark.parametrize(("name", "values", "words"), BREAKS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BREAKS)])
def test_a_rule_broken_alone_says_so_alone(name: str, values: dict[str, Any], words: tuple[str, ...]) -> None:
    rule = next(rule for rule in RULES if rule.name == name)
    lines = violations(change(VALID, values))
    assert len(lines) == 1, lines
    assert rule.why in lines[0]
    for word in (*words, *(key for key in rule.keys if "*" not in key)):
        assert word in lines[0]
    assert "\n" not in lines[0]


def test_every_rule_is_broken_above() -> None:
    assert {rule.name for rule in RULES} == {name for name, _, _ in BREAKS}
    assert all(rule.why for rule in RULES)


@pytest.mark.parametrize("task", ["t2i", "i2t", "edit", "interleave", "video", "text"])
def test_tasks_and_branches(task: Any) -> None:
    """Which branch each task needs, written out."""
    needs_gen = task in ("t2i", "edit", "interleave", "video")
    needs_und = task in ("i2t", "edit", "interleave")
    sources = (SourceConfig("only", "only-*.tar", task),)
    quiet = change(VALID, {"data.sources": sources, "data.val_sources": (), "telemetry.sample_every": 0})
    assert violations(quiet) == []
    assert bool(violations(change(quiet, {"model.visual_gen": False}))) == needs_gen
    assert bool(violations(change(quiet, {"model.visual_und": False}))) == needs_und


class Spy:
    """Stands for a part of a config and notes the dotted keys of the scalars read from it."""

    def __init__(self, node: Any, path: str, seen: set[str]) -> None:
        self._node, self._path, self._seen = node, path, seen

    def __getattr__(self, name: str) -> Any:
        member = type(self._node).__dict__.get(name)
        if isinstance(member, property):
            return member.fget(self)  # type: ignore[misc]
        value, path = getattr(self._node, name), f"{self._path}.{name}".lstrip(".")
        if is_dataclass(value):
            return Spy(value, path, self._seen)
        if isinstance(value, tuple) and value and is_dataclass(value[0]):
            return tuple(Spy(item, f"{path}.*", self._seen) for item in value)
        self._seen.add(path)
        return value


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rules_read_only_the_keys_that_they_declare(rule: Any) -> None:
    """Else a rule could judge a value that was already reported, or leave a key out of its message."""
    seen: set[str] = set()
    for config in (VALID, *(change(VALID, values) for _, values, _ in BREAKS), *(change(VALID, v) for v in KEEPS)):
        list(rule.check(Spy(config, "", seen)))
    lists = {
        "data.sources",
        "data.val_sources",
        "telemetry.edits",
        "telemetry.questions",
    }  # read as a whole only where they are empty
    assert seen - lists == set(rule.keys) - lists


def test_declared_keys_exist() -> None:
    known = set(known_keys())
    for rule in RULES:
        assert set(rule.keys) <= known
    assert {key for row in RANGES for key in row.keys} <= known


def _numbers(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys of the numbers in a dataclass type, from its annotations."""
    for field in fields(node):
        key = f"{path}.{field.name}".lstrip(".")
        hint = str(field.type)
        if is_dataclass(field.type):
            yield from _numbers(field.type, key)
        elif field.type in (int, float) or "int" in hint or "float" in hint:
            yield f"{key}.*" if "tuple" in hint else key


def test_every_number_has_one_range() -> None:
    in_rows = [key for row in RANGES for key in row.keys]
    assert len(in_rows) == len(set(in_rows))
    assert set(in_rows) == {*_numbers(Config), "data.sources.*.weight", "data.val_sources.*.weight"}


OUTSIDE = {
    "at least 1": 0,
    "at least 0": -1,
    "greater than 0": 0,
    "from 0 to 1": 1.01,
    "at least 0 and less than 1": 1.0,
    "any number": None,
}


@pytest.mark.parametrize(("key", "text"), [(key, row.text) for row in RANGES for key in row.keys])
def test_numbers_outside_their_range(key: str, text: str) -> None:
    """One value outside gives one line with key and value, and no division by zero in a rule that reads it."""
    if OUTSIDE[text] is None:
        return
    concrete = key.replace("sources.*", "sources.1").replace(".*", "")
    value: Any = OUTSIDE[text] if not key.endswith(".*") else (1, OUTSIDE[text])
    shown = f"{concrete}.1 = {OUTSIDE[text]}" if key.endswith(".*") else f"{concrete} = {value}"
    lines = violations(change(VALID, {concrete: value}))
    assert lines == [f"{shown}: expected {text}"]


def test_all_numbers_wrong_at_once_are_all_reported() -> None:
    keys = [key for row in RANGES for key in row.keys if "*" not in key and row.text == "at least 1"]
    lines = violations(change(VALID, dict.fromkeys(keys, 0)))
    assert sorted(lines) == sorted(f"{key} = 0: expected at least 1" for key in keys)


def test_doubtful_keys_silence_the_rules_that_read_them() -> None:
    broken = change(VALID, {"model.kv_heads": 3, "data.min_tokens": 513})
    assert len(violations(broken)) == 2
    (line,) = violations(broken, {"model.heads"})
    assert "data.min_tokens" in line
    assert len(violations(broken, {"model"})) == 1  # a section is doubtful with all that it holds
    task = change(VALID, {"model.visual_und": False})
    assert violations(task, {"data.sources.0.task"}) == []
    assert violations(task, {"data.sources.0.weight"}) != []


@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 24), st.integers(1, 96)
)
def test_world_is_accepted_exactly_when_it_divides(tp: int, pp: int, cp: int, vpp: int, packs: int, world: int) -> None:
    fits = [
        dp
        for dp in range(1, world + 1)
        if dp * tp * pp * cp == world and packs % dp == 0 and (vpp == 1 or (packs // dp) % pp == 0)
    ]
    grid = {"parallel.tp": tp, "parallel.pp": pp, "parallel.cp": cp, "parallel.vpp": vpp}
    config = change(VALID, {**grid, "train.packs_per_step": packs})
    if fits:
        assert [check_world(config, world)] == fits
    else:
        with pytest.raises(UserError, match=r"parallel\.tp = "):
            check_world(config, world)


@pytest.mark.parametrize(
    ("values", "world", "words"),
    [
        ({"parallel.tp": 2, "parallel.cp": 2}, 6, ("world size = 6", "parallel.cp = 2", "= 4 ranks", "4 or 8 ranks")),
        ({"parallel.pp": 4}, 3, ("world size = 3", "parallel.pp = 4", "Start 4 ranks")),
        ({"train.packs_per_step": 5}, 2, ("train.packs_per_step = 5", "dp = 2", "4 or 6")),
        (
            {"parallel.pp": 2, "parallel.vpp": 2, "train.packs_per_step": 6},
            4,
            ("train.packs_per_step = 6", "parallel.pp = 2", "parallel.vpp = 2", "dp = 2", "4 or 8"),
        ),
    ],
)
def test_world_messages_name_both_sides_and_a_way_out(
    values: dict[str, int], world: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        check_world(change(VALID, values), world)
    for word in words:
        assert word in str(caught.value)
