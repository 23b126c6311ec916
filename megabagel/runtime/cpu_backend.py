"""CPU backend: runs megatron-core on a CPU with gloo. All patches of torch for it are in this file.

megatron-core requests "cuda" by name, by index or through `torch.cuda`. On a machine without CUDA a TorchFunctionMode
and a few replaced functions of `torch.cuda` return the CPU instead. Schedules, optimizer, collectives and checkpoints
are the same code as on a cluster.
"""

import logging
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megabagel.runtime.packages import check_apex

_CPU = torch.device("cpu")
_installed: list[TorchFunctionMode] = []


def install() -> None:
    """Prepare this process for megatron-core; call it before the first import of megatron.

    On a machine with CUDA only the installed packages are checked.

    Raises:
        UserError: for a package that megatron-core would choose and then fail in (see `runtime.packages`).
    """
    quieten()
    check_apex()
    if _installed or torch.cuda.is_available():
        return
    _answer_for_cuda()
    mode = _CudaMeansCpu()
    # Entered and never left: the patch holds for the life of the process.
    mode.__enter__()
    _installed.append(mode)
    import megatron.core.tensor_parallel.random as random

    # A private of megatron-core, imported from torch: it defers calls until CUDA is initialized, which never happens
    # here.
    random._lazy_call = lambda callback, **_: callback()


def quieten() -> None:
    """Silence megatron-core's warnings about absent optional packages; `megabagel doctor` reports what is in use."""
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex|apex|TransformerEngine).*")
    warnings.filterwarnings("ignore", message=".*torch.distributed.*deprecated.*")
    # The distributed optimizer's shards are views of its buffers, hence not leaves.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    logging.getLogger("megatron").setLevel(logging.ERROR)


def _is_cuda(value: Any) -> bool:
    """Whether a device argument means a CUDA device: torch.device, string or index."""
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return (isinstance(value, str) and value.startswith("cuda")) or type(value) is int


class _CudaMeansCpu(TorchFunctionMode):
    """Creates tensors on the CPU where a CUDA device is requested."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer compares `parameter.type()` with names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Generators:
    """Stand-in for `torch.cuda.default_generators` with the CPU generator at every index."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.default_generator


def _answer_for_cuda() -> None:
    """Replace the functions of `torch.cuda` that megatron-core calls.

    Each name gets its own function: torch.compile's rules refuse one object under two names.
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.synchronize = lambda *_, **__: None
    cuda.set_device = lambda *_, **__: None
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_, **__: torch.get_rng_state()
        module.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.default_generators = _Generators()
