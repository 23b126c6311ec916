"""The autoencoder's config from its weights file (docs/bagel.md#vae)."""

from pathlib import Path

import torch

from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.config.schema import VaeConfig
from megabagel.errors import UserError
from megabagel.model.vae_flux import Autoencoder


def vae_config(path: Path) -> VaeConfig:
    """Codec flux with the widths and levels of `path`, an `ae.safetensors`.

    Raises UserError when its tensors are not exactly those of such an autoencoder.
    """
    files = TensorFiles(path)
    try:
        width = files.shape("encoder.conv_in.weight")[0]
        levels = _count(files, "encoder.down.")
        config = VaeConfig(
            codec="flux",
            path=str(path.absolute()),
            channels=files.shape("decoder.conv_in.weight")[1],
            downsample=2 ** (levels - 1),
            width=width,
            width_multipliers=tuple(
                files.shape(f"encoder.down.{level}.block.0.conv1.weight")[0] // width for level in range(levels)
            ),
            res_blocks=_count(files, "encoder.down.0.block."),
        )
        with torch.device("meta"):
            expected = {name: tuple(tensor.shape) for name, tensor in Autoencoder(config).state_dict().items()}
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: no autoencoder of FLUX ({error!r}); expected its ae.safetensors") from error
    for name in sorted(expected.keys() ^ files.shapes.keys()):
        raise UserError(
            f"{path}: tensor {name} is {'missing' if name in expected else 'unexpected'}; expected the tensors of the "
            "FLUX autoencoder, no more and no less"
        )
    for name, shape in expected.items():
        if files.shape(name) != shape:
            raise UserError(f"{path}: tensor {name} is {list(files.shape(name))}, expected {list(shape)}")
    return config


def _count(files: TensorFiles, prefix: str) -> int:
    """Numbers that follow a prefix in names."""
    return len({name[len(prefix) :].split(".")[0] for name in files.names if name.startswith(prefix)})
