"""Which weights a stage of training leaves alone (BAGEL section 4; docs/bagel.md#freezing)."""

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
    """Whether the parameter `name` is in one of the sets of `freeze` (see `TrainConfig.freeze`).

    Only weights that belong to the understanding expert alone are of the set `und`: what one copy does for both
    experts, in the dense and MoE variants, goes on learning from generation. There the released code stops gradients
    at the two ends of the understanding stream only, and so does `Bagel.forward`.
    """
    und = {"mot": f"{UND_INPUTS}|{UND_LAYERS}|{UND_NORM}", "moe": f"{UND_INPUTS}|{UND_NORM}", "dense": UND_INPUTS}
    patterns = {"llm": LLM, "vit": VIT, "connector": CONNECTOR, "latent": LATENT, "und": und[config.variant]}
    return any(re.match(patterns[chosen], name) for chosen in freeze)


def freeze_parameters(model: nn.Module, config: ModelConfig, freeze: Collection[str]) -> None:
    """Mark the frozen parameters of a model or of a stage of it as not learning."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_frozen(name, config, freeze))
