"""Collectives as phases: every one that this process starts, whichever library starts it.

Tensor-parallel linears and the distributed optimizer of megatron-core call torch.distributed themselves, and some bind
its functions by value when they are imported, so there is no call site of ours to measure. What was tried:

- `TransformerConfig.timers` (see `parallel.megatron_timers`) covers pipeline exchanges, but no other collective.
- A `TorchDispatchMode` sees collectives, and every other operator too: a small in-place addition took 27 us with an
  empty one, 3.4 us without, which would make the measured steps slower than those they stand for.
- Collective events of torch's profiler: gloo's lie in a thread of their own and overlap with computing, so on a CPU
  they do not tell how long the main thread waited; and the profiler takes 90 us per range.

What remains is the dispatcher. All collectives of torch.distributed are operators of the namespace `c10d`; a kernel
under the Autograd key runs before the backend's, costs nothing for other operators, and goes when the library object
does. `_scoped_library` and `_AutoDispatchBelowAutograd` are privates of torch: the second is what lets the kernel call
the backend's own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megabagel.runtime.phase import phase

_COLLECTIVES = (
    "allreduce_",
    "allreduce_coalesced_",
    "allgather_",
    "_allgather_base_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "alltoall_",
    "alltoall_base_",
    "broadcast_",
)
"""Without send and recv_: a schedule may start two of them that wait for each other."""


@contextmanager
def collectives_as_phases(name: str) -> Iterator[None]:
    """Make every collective that is started inside a phase `name` that lasts until it is finished.

    Waiting takes away what overlap a collective had; without it, its time would count for whatever waits for it later.
    """
    with torch.library._scoped_library("c10d", "IMPL") as library:
        for operator in _COLLECTIVES:
            library.impl(operator, _finished_in_phase(getattr(torch.ops.c10d, operator).default, name), "Autograd")
        yield


def _finished_in_phase(operator: Callable[..., Any], name: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        with phase(name, counted=False), torch._C._AutoDispatchBelowAutograd():
            found = operator(*args)
            work = found[-1] if isinstance(found, tuple | list) else found
            dist.Work.unbox(work).wait()
            return found

    return kernel
