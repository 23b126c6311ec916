"""Entries of published config files: known ones with the right value, or a refusal by name."""

from pathlib import Path
from typing import Any

import pytest

from megabagel.checkpoint.hf.allowed import check_allowed
from megabagel.checkpoint.hf.config import llm_fields, llm_json, vit_json
from megabagel.checkpoint.hf.folder import LLM_CONFIG, VIT_CONFIG
from megabagel.config.schema import ModelConfig
from megabagel.errors import UserError

WHERE = Path("llm_config.json")
LLM = llm_json(ModelConfig())


def test_what_is_exported_is_allowed() -> None:
    check_allowed(LLM, LLM_CONFIG, WHERE)
    check_allowed(vit_json(ModelConfig()), VIT_CONFIG, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"layer_types": ["full_attention"] * 4},
        {"partial_rotary_factor": 1.0},
        {"dtype": "bfloat16", "transformers_version": "5.0.0"},
    ],
)
def test_entries_that_ask_for_what_is_computed_pass(change: dict[str, Any]) -> None:
    check_allowed(LLM | change, LLM_CONFIG, WHERE)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}},
        {"rope_parameters": 7},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": [["full_attention"]]},
        {"layer_types": 4},
        {"partial_rotary_factor": 0.5},
        {"use_sliding_window": True},
        {"hidden_act": "gelu"},
        {"hidden_act": ["silu"]},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": "Qwen2ForCausalLM"},
        {"logit_scale": 0.5},
        {"final_logit_softcapping": 30.0},
        {"a\x1b[31m": 1},
    ],
)
def test_any_other_entry_is_refused_by_name(change: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_allowed(LLM | change, LLM_CONFIG, WHERE)
    (name,) = change
    assert name.split("\x1b")[0] in str(caught.value) and "\x1b" not in str(caught.value)


def test_the_base_of_the_rotation_may_stand_where_transformers_5_writes_it() -> None:
    new = {key: value for key, value in LLM.items() if key != "rope_theta"}
    assert llm_fields(new | {"rope_parameters": {"rope_theta": 5e5}})["rope_base"] == 5e5
    with pytest.raises(KeyError):
        llm_fields(new)
    for wrong in ({"rope_theta": "1e6"}, {"rms_norm_eps": "x"}, {"hidden_size": 0}, {"num_hidden_layers": 10**30}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            llm_fields(LLM | wrong)
    with pytest.raises(ValueError, match="rope_theta is not the one"):
        llm_fields(LLM | {"rope_parameters": {"rope_theta": 1.0}})
