"""Where the suite runs: on a GPU at full size, or as a toy in Triton's interpreter; and the versions it runs with."""

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from megabagel.sequence.keys import seed64

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

QUERIES = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")


@dataclass(frozen=True)
class Setting:
    """Device and sizes of a run. Toy times are those of an interpreter and say nothing about a GPU."""

    toy: bool
    device: torch.device

    def pick(self, full: T, toy: T) -> T:
        """A size, or its toy counterpart."""
        return toy if self.toy else full

    def normal(self, *shape: int, key: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers on the device, a function of key and shape: chips are faster on zeros."""
        draw = torch.Generator(self.device).manual_seed(seed64("gpu suite", key, *shape))
        return torch.randn(shape, generator=draw, device=self.device).to(dtype)

    def integers(self, top: int, *shape: int, key: str) -> Tensor:
        """int64 numbers in [0, top), a function of key and shape."""
        draw = torch.Generator(self.device).manual_seed(seed64("gpu suite", key, *shape))
        return torch.randint(top, shape, generator=draw, device=self.device)


def prepare(toy: bool) -> Setting:
    """Make this process ready. Triton has to be imported after TRITON_INTERPRET is set, so this comes first."""
    if not toy:
        return Setting(False, torch.device("cuda"))
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
    from tests.kernels.triton import bf16_shim

    bf16_shim.install()
    return Setting(True, torch.device("cpu"))


def environment(setting: Setting) -> dict[str, str]:
    """Date, commit, versions, and the GPU with its clocks where they can be read."""
    import triton

    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40") or "unknown",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
    }
    if setting.toy:
        return found | {"device": "Triton's interpreter", "timings": "meaningless: toy sizes in an interpreter"}
    values = smi(*QUERIES)
    return found | {"device": torch.cuda.get_device_name(), "timings": "medians of CUDA events"} | values


def smi(*queries: str) -> dict[str, str]:
    """What nvidia-smi says of this process's GPU, which CUDA may number otherwise; empty where it cannot be asked."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    text = output("nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(queries)}", "--format=csv,noheader")
    return dict(zip(queries, text.split(", "), strict=True)) if text.count(", ") == len(queries) - 1 else {}


def output(*command: str) -> str:
    """What a command prints; empty if it fails or does not exist."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
