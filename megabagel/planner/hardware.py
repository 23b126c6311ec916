"""GPUs and the machines around them: every number of the hardware that the planner uses, with its source.

Sources. Peaks, memory bandwidth, NVLink and power: NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and HGX
B200; peaks are dense (data sheets quote sparse ones, twice as high), NVLink is one direction (they quote both).
Memory: what the driver reports, in GiB. Network, host memory and power of a server: data sheets of DGX A100, H100, H200
and B200 (one 200 or 400 Gbit/s port per GPU; power of the whole server over its 8 GPUs). Storage: no data sheet says
it; 2 GB/s per server to a shared file system is an assumption, to be replaced in a file of your own.
"""

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file
from megabagel.config.yaml_text import MOST_BYTES, YamlError, load_yaml
from megabagel.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU of a cluster and its share of what surrounds it. GB are 10^9 bytes, GiB 2^30."""

    name: str
    bf16_tflops: float
    """Dense tensor-core peak."""
    tf32_tflops: float
    """Dense peak of fp32 convolutions, which cuDNN runs in TF32 (the image codec)."""
    fp32_tflops: float
    """Peak of fp32 matmuls, which torch keeps off the tensor cores."""
    memory_gib: float
    bandwidth_gb_s: float
    """Of its memory."""
    nvlink_gb_s: float
    """To the other GPUs of the server, one direction."""
    network_gb_s: float
    """To other servers, one direction, per GPU."""
    gpus_per_node: int
    server_watt: float
    """Of the whole server, per GPU."""
    host_gib: float
    """Memory of the server, per GPU."""
    storage_gb_s: float
    """To the checkpoint file system, per server."""

    def peak(self, precision: str) -> float:
        """FLOP/s of matmuls in `precision` (bf16 or fp32)."""
        return 1e12 * (self.bf16_tflops if precision == "bf16" else self.fp32_tflops)


CATALOG = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312, 156, 19.5, 80.0, 2039, 300, 25, 8, 6500 / 8, 2048 / 8, 2),
        Gpu("h100", 989, 494, 67, 79.6, 3350, 450, 50, 8, 10200 / 8, 2048 / 8, 2),
        Gpu("h200", 989, 494, 67, 140.4, 4800, 450, 50, 8, 10200 / 8, 2048 / 8, 2),
        Gpu("b200", 2250, 1100, 75, 179.0, 8000, 900, 50, 8, 14300 / 8, 2048 / 8, 2),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU of the catalog, or one described by a YAML file: `base: h100` and the numbers that differ.

    Raises UserError for a name that is not in the catalog, and for a file that does not describe a GPU.
    """
    if name in CATALOG:
        return CATALOG[name]
    if not name.endswith((".yaml", ".yml")):
        near = difflib.get_close_matches(name.lower(), CATALOG, n=2, cutoff=0.4)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise UserError(
            f"--gpu {name}: unknown GPU; {hint}expected one of {', '.join(CATALOG)} or a YAML file such as "
            "examples/hardware/cloud_h100.yaml"
        )
    return _from_file(Path(name))


def _from_file(path: Path) -> Gpu:
    try:
        content: Any = load_yaml(read_file(path, MOST_BYTES).decode("utf-8"))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--gpu {path}: cannot be read ({reason}); expected a YAML file with `base: h100`") from error
    if not isinstance(content, dict):
        raise UserError(f"--gpu {path}: holds {content!r}; expected a mapping such as `base: h100`")
    base = content.pop("base", None)
    if base not in CATALOG:
        raise UserError(f"--gpu {path}: base = {base!r}: expected one of {', '.join(CATALOG)}")
    known = {field.name: field.type for field in fields(Gpu)}
    for key, value in content.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            raise UserError(
                f"--gpu {path}: unknown key {key!r}; {f'did you mean {near[0]}? ' if near else ''}"
                f"Known keys: base, {', '.join(known)}"
            )
        _check(path, key, value, known[key])
    return replace(CATALOG[base], **{"name": path.stem, **content})


def _check(path: Path, key: str, value: Any, kind: Any) -> None:
    """Refuse a value that is not a name, a positive number or a positive whole number, as the key wants."""
    if kind is str:
        if not isinstance(value, str):
            raise UserError(f"--gpu {path}: {key} = {value!r}: expected a name")
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf") or (kind is int and not isinstance(value, int)):
        wanted = "a whole number of at least 1" if kind is int else "a number above 0"
        raise UserError(f"--gpu {path}: {key} = {value!r}: expected {wanted}")
