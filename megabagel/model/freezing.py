"""Frozen parameter sets of the training stages (BAGEL section 4; docs/bagel.md#freezing)."""

import re
from collections.abc import Collection

from torch import nn

from megabagel.config.schema import ModelConfig

LLM = r"embed\.tokens\.|layers\.|heads\.(norm|lm_head)\."
VIT = r"embed\.vit\."
CONNECTOR = r"embed\.connector\."
LATENT = r"embed\.(vae2llm|time_embedder)\.|heads\.llm2vae\."
UND_INPUTS = rf"embed\.tokens\.|{VIT}|{CONNECTOR}"
UND_LAYERS = r"layers\.\d+\.\w+\.und\."
UND_NORM = r"heads\.norm\.und\."


def is_frozen(name: str, config: ModelConfig, freeze: Collection[str]) -> bool:
    """Whether a parameter is frozen.

    Args:
        name: name of the parameter in the whole model.
        config: the model; its variant determines which weights belong to the understanding expert alone.
        freeze: names of sets, `TrainConfig.freeze`.
    """
    # Weights shared by both experts (all of them in `dense`, attention in `moe`) are not in the set `und`: they go on
    # learning from generation. In these variants the released code, and `Bagel.through_layers` with `Heads.forward`,
    # stop gradients at both ends of the understanding stream only.
    und = {"mot": f"{UND_INPUTS}|{UND_LAYERS}|{UND_NORM}", "moe": f"{UND_INPUTS}|{UND_NORM}", "dense": UND_INPUTS}
    patterns = {"llm": LLM, "vit": VIT, "connector": CONNECTOR, "latent": LATENT, "und": und[config.variant]}
    return any(re.match(patterns[chosen], name) for chosen in freeze)


def freeze_parameters(model: nn.Module, config: ModelConfig, freeze: Collection[str]) -> None:
    """Set `requires_grad` of every parameter of a model or pipeline stage according to `freeze`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, config, freeze))
