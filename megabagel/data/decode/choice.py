"""Selection of the decode engine, once at start; the log names the engine and the reason."""

import logging
from importlib.util import find_spec
from typing import Literal

import PIL
import torch

from megabagel.data.decode.contract import DecodeEngine
from megabagel.data.decode.dali import DaliEngine
from megabagel.data.decode.host import HostEngine
from megabagel.errors import UserError

logger = logging.getLogger(__name__)


def choose_engine(
    name: Literal["auto", "host", "dali"], device: torch.device | str = "cpu", threads: int = 1, workers: int = 0
) -> DecodeEngine:
    """Create the decode engine.

    Args:
        name: `data.decode`; `auto` takes DALI if it is installed and training runs on a GPU, else Pillow.
        device: device that training runs on.
        threads: `data.decode_threads`.
        workers: `data.workers`. Worker processes decode on the CPU and leave the GPU to training.

    Raises:
        UserError: `dali` was requested and is not installed.
    """
    device = torch.device(device)
    installed = _dali_installed()
    if name == "dali" and not installed:
        raise UserError(
            "data.decode=dali, but the package nvidia.dali is not installed: pip install 'megabagel[dali]' (CUDA 13; "
            "it needs no GPU), or set data.decode=host"
        )
    if name == "dali" or (name == "auto" and device.type == "cuda" and installed):
        why = "data.decode asks for it" if name == "dali" else "training on a GPU, and it is installed"
        import nvidia.dali

        where = "cpu" if workers else str(device)
        logger.info("decode engine: dali (DALI %s on %s; %s)", nvidia.dali.__version__, where, why)
        return DaliEngine(where, threads)
    if name == "host":
        why = "data.decode asks for it"
    elif device.type == "cuda":
        why = "nvidia.dali is not installed: pip install 'megabagel[dali]' decodes faster"
    else:
        why = "training on a CPU, where the reference is affordable"
    logger.info("decode engine: host (Pillow %s; %s)", PIL.__version__, why)
    return HostEngine(threads)


def _dali_installed() -> bool:
    try:
        return find_spec("nvidia.dali") is not None
    # `find_spec` imports the parent package, and raises if there is no package `nvidia` at all.
    except ModuleNotFoundError:
        return False
