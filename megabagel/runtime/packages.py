"""Check of GPU packages that megatron-core uses as soon as they are importable: unusable ones are refused by name."""

from importlib.util import find_spec
from pathlib import Path

from megabagel.errors import UserError

APEX_KERNELS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")
"""Extension modules of an Apex built with its CUDA kernels."""


def check_apex() -> bool:
    """Return whether NVIDIA's Apex is installed. Looks at files without importing anything.

    Raises:
        UserError: for the unrelated package `apex` on PyPI, and for an Apex built without CUDA kernels, which
            megatron-core would choose and then fail in.
    """
    spec = find_spec("apex")
    if spec is None or not spec.submodule_search_locations:
        return False
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "optimizers" / "fused_adam.py").is_file():
        raise UserError(
            f"the package 'apex' in {folder} is not NVIDIA Apex but another project of that name on PyPI: "
            "pip uninstall apex. NVIDIA's is built from source (see setup.py) and optional."
        )
    missing = [name for name in APEX_KERNELS if find_spec(name) is None]
    if missing:
        raise UserError(
            f"NVIDIA Apex in {folder} was built without CUDA kernels ({', '.join(missing)} missing), and megatron-core "
            "would choose it and fail: rebuild it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or pip uninstall apex."
        )
    return True
