"""The device of this rank, its torch.distributed backend, and its peak memory."""

import resource

import torch


def current_device() -> torch.device:
    """Return the CUDA device of this rank, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def comm_backend() -> str:
    """Return the torch.distributed backend for that device: nccl or gloo."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor on `device`, copied from pinned memory without waiting for the device.

    From pageable memory every copy would be a synchronization. The pinned copy may go out of scope at once: torch's
    caching host allocator keeps its block until the transfer has ended.
    """
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True)


def peak_memory() -> int:
    """Return the peak bytes of this process: allocated on its CUDA device, or resident in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
