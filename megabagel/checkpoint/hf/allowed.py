"""Entries of published config files that are understood; any other one is refused by name.

An entry that this program has never heard of may change what the weights compute (`rope_scaling`, `layer_types` and
`partial_rotary_factor` came that way), so the list is of what is known, not of what is forbidden.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megabagel.checkpoint.hf.folder import LLM_CONFIG, VIT_CONFIG
from megabagel.errors import UserError, printable

_READ = {
    LLM_CONFIG: (
        "num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
        "rms_norm_eps rope_theta layer_module qk_norm attention_bias"
    ),
    VIT_CONFIG: (
        "hidden_size num_attention_heads intermediate_size patch_size layer_norm_eps num_hidden_layers image_size"
    ),
}
"""Taken over or compared with the tensors."""

_WITHOUT_EFFECT = (
    "model_type architectures torch_dtype dtype transformers_version initializer_range initializer_factor use_cache "
    "max_position_embeddings max_window_layers sliding_window attention_dropout hidden_dropout _name_or_path "
    "bos_token_id eos_token_id pad_token_id return_dict output_hidden_states output_attentions chunk_size_feed_forward "
    "tie_word_embeddings freeze_und freeze_gen auto_map id2label label2id problem_type task_specific_params "
    "_attn_implementation _attn_implementation_autoset attn_implementation projection_dim projector_hidden_act "
    "vision_use_head pretraining_tp"
)
"""About training from scratch, generation or the library; `tie_word_embeddings` is judged by the tensors."""


def _default_rope(value: Any) -> bool:
    """Whether rope parameters ask for the plain rotation of all channels."""
    if not isinstance(value, dict):
        return value is None
    kind = value.get("rope_type", value.get("type", "default"))
    return kind == "default" and not value.keys() - {"rope_type", "type", "rope_theta"}


_FIXED: dict[str, dict[str, tuple[str, Callable[[Any], bool]]]] = {
    LLM_CONFIG: {
        "hidden_act": ("'silu'", lambda value: value == "silu"),
        "rope_scaling": ("none, or the default", _default_rope),
        "rope_parameters": ("those of the default rotation", _default_rope),
        "use_sliding_window": ("false", lambda value: value is False),
        "layer_types": (
            "full_attention in every layer",
            lambda value: value is None or set(value) == {"full_attention"},
        ),
        "partial_rotary_factor": ("1.0", lambda value: value == 1),
        "mlp_bias": ("false", lambda value: value is False),
        "is_causal": ("true", lambda value: value is True),
    },
    VIT_CONFIG: {
        "hidden_act": ("'gelu_pytorch_tanh'", lambda value: value == "gelu_pytorch_tanh"),
        "rope": ("false", lambda value: value is False),
        "num_channels": ("3", lambda value: value == 3),
    },
}
"""Settings that our model computes in one way only."""

ARCHITECTURES = {
    LLM_CONFIG: ("Qwen2ForCausalLM", "Qwen2Model", "Bagel", "BagelForConditionalGeneration"),
    VIT_CONFIG: ("SiglipVisionModel", "SiglipModel"),
}


def check_allowed(config: Mapping[str, Any], kind: str, where: Path) -> None:
    """Raise UserError for an entry that is not known, or asks for another computation than ours.

    Args:
        config: content of the file.
        kind: LLM_CONFIG or VIT_CONFIG.
        where: the file, for the message.
    """
    known = {*_READ[kind].split(), *_WITHOUT_EFFECT.split()}
    for key, value in config.items():
        if key in _FIXED[kind]:
            expected, holds = _FIXED[kind][key]
            if not _holds(holds, value):
                raise UserError(
                    f"{where}: {key} = {value!a:.80}, expected {expected}: BAGEL has no other, and with another its "
                    "weights mean something else. Check that this is the model's own file."
                )
        elif key not in known:
            raise UserError(
                f"{where}: entry {printable(key)[:80]} = {value!a:.80} is not known here and may change what "
                "the weights compute. Remove the entry if it has no effect on them."
            )
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(name in ARCHITECTURES[kind] for name in named)):
        raise UserError(
            f"{where}: architectures = {named!a:.80}, expected {' or '.join(ARCHITECTURES[kind])}. Name the model that "
            "BAGEL is made of."
        )


def _holds(check: Callable[[Any], bool], value: Any) -> bool:
    try:
        return check(value)
    except TypeError:  # a list of lists, a number where a list should be
        return False
