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


def peak_memory() -> int:
    """Return the peak bytes of this process: allocated on its CUDA device, or resident in host memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
