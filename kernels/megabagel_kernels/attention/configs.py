"""Block sizes, warps and pipeline stages of the Triton attention kernels: a table, never autotuned at run time.

Autotuning could choose differently on each rank and in each run, and with the block sizes the order of summation
changes. Every entry was compiled ahead of time for its architecture with its Triton version (`tools/kernel_gate.py`):
products run on the tensor cores without serialized wgmma, nothing spills inside a loop with matrix products, and shared
memory suffices for every head dim up to 128.
"""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

KERNELS = ("forward", "dq", "dkv")


@dataclass(frozen=True)
class Config:
    """Launch configuration of one kernel."""

    rows: int  # queries of a block
    cols: int  # keys of a block
    warps: int
    stages: int  # tiles in flight in a loop


@dataclass(frozen=True)
class Configs:
    """Launch configurations of the three kernels."""

    forward: Config
    dq: Config
    dkv: Config
    descriptors: bool  # tiles by host descriptors (TMA) instead of pointers
    split_below: int  # dkv: one query head per program, not a group, if there would be fewer programs than this

    def numbers(self) -> list[int]:
        """All fields as integers, because operators of `torch.library` take no objects; `of` is the inverse."""
        configs = (self.forward, self.dq, self.dkv)
        numbers = [number for config in configs for number in (config.rows, config.cols, config.warps, config.stages)]
        return [*numbers, int(self.descriptors), self.split_below]

    @staticmethod
    def of(numbers: list[int]) -> "Configs":
        """Inverse of `numbers`."""
        forward, dq, dkv = (Config(*numbers[start : start + 4]) for start in (0, 4, 8))
        return Configs(forward, dq, dkv, bool(numbers[12]), numbers[13])


TABLE: dict[tuple[str, int, str], Config] = {
    ("3.6", 80, "forward"): Config(64, 64, 8, 2),
    ("3.6", 80, "dq"): Config(64, 64, 8, 2),
    ("3.6", 80, "dkv"): Config(64, 64, 8, 2),
    ("3.6", 90, "forward"): Config(128, 128, 8, 2),
    ("3.6", 90, "dq"): Config(128, 64, 8, 2),
    ("3.6", 90, "dkv"): Config(64, 128, 8, 2),
    ("3.6", 100, "forward"): Config(128, 64, 8, 3),
    ("3.6", 100, "dq"): Config(128, 64, 8, 2),
    ("3.6", 100, "dkv"): Config(64, 64, 4, 2),
    ("3.7", 80, "forward"): Config(64, 64, 8, 2),
    ("3.7", 80, "dq"): Config(64, 64, 8, 2),
    ("3.7", 80, "dkv"): Config(64, 64, 8, 2),
    ("3.7", 90, "forward"): Config(128, 128, 8, 2),
    ("3.7", 90, "dq"): Config(128, 64, 8, 2),
    ("3.7", 90, "dkv"): Config(64, 128, 8, 2),
    ("3.7", 100, "forward"): Config(128, 64, 8, 3),
    ("3.7", 100, "dq"): Config(128, 64, 8, 2),
    ("3.7", 100, "dkv"): Config(64, 64, 4, 2),
}
"""Per (minor version of Triton, compute capability x 10, kernel): 16-bit inputs, head dim a power of two.

sm_80 uses pointers, sm_90 and sm_100 descriptors.
"""

PADDED = {
    80: (Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    90: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
    100: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
}
"""Forward, dq and dkv per architecture for head dims that are padded to a tile: always pointers, all versions alike."""

SPLIT_BELOW = 528
"""Four programs for each of an H100's 132 SMs; with fewer, the last programs run while most of the chip is idle."""

FP32 = Configs(Config(32, 32, 16, 1), Config(32, 32, 16, 1), Config(32, 32, 16, 1), False, SPLIT_BELOW)
"""fp32 has no tensor cores at full precision: small blocks on every architecture. For checks, not for speed."""

INTERPRETER = Configs(Config(64, 64, 4, 1), Config(64, 64, 4, 1), Config(64, 64, 4, 1), False, 0)
"""For Triton's CPU interpreter, whose time grows with the number of blocks."""


HEAD_DIMS = range(8, 129, 8)
"""Head dims that the kernels take."""


def tile_width(head_dim: int) -> int:
    """Columns of a tile: the next power of two, and at least 16 for the matrix products."""
    return max(16, 1 << (head_dim - 1).bit_length())


def configs_for(triton_version: str, arch: int, dtype: torch.dtype, head_dim: int) -> Configs:
    """The configurations for a Triton version such as 3.7.1 and an architecture such as 90 (compute capability 9.0).

    Raises ValueError for a version or an architecture that is not in the table.
    """
    minor = ".".join(triton_version.split(".")[:2])
    if (minor, arch, "forward") not in TABLE:
        known = sorted({f"Triton {minor} on sm_{arch}" for minor, arch, _ in TABLE})
        raise ValueError(f"no attention kernels for Triton {minor} on sm_{arch}, expected {', '.join(known)}")
    if dtype == torch.float32:
        return FP32
    if head_dim != tile_width(head_dim):
        return Configs(*PADDED[arch], descriptors=False, split_below=SPLIT_BELOW)
    forward, dq, dkv = (TABLE[minor, arch, kernel] for kernel in KERNELS)
    return Configs(forward, dq, dkv, descriptors=arch >= 90, split_below=SPLIT_BELOW)


def configs_here(dtype: torch.dtype, head_dim: int) -> Configs:
    """The configurations for this process: its Triton and current GPU, or the interpreter if TRITON_INTERPRET is set.

    Raises ImportError without Triton, RuntimeError without a GPU, and ValueError as `configs_for` does.
    """
    import triton

    if triton.knobs.runtime.interpret:
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability()
    return configs_for(triton.__version__, 10 * major + minor, dtype, head_dim)


def why_unavailable_head_dim(head_dim: int) -> str:
    """Why the attention kernels cannot run this head dim; empty if they can."""
    if head_dim in HEAD_DIMS:
        return ""
    return f"head dim {head_dim}, the kernels take multiples of {HEAD_DIMS.step} from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"


def why_unavailable_here(dtype: torch.dtype, head_dim: int) -> str:
    """Why the kernels cannot run in this process; empty if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if not triton.knobs.runtime.interpret and not torch.cuda.is_available():
        return "there is no GPU (TRITON_INTERPRET=1 in the environment interprets the kernels, slowly)"
    try:
        configs_here(dtype, head_dim)
    except ValueError as error:
        return str(error)
    return ""
