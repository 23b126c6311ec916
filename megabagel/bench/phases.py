"""Where a training step's time goes, measured from outside: functions of the trainer and of torch are wrapped while a
few steps run, so that training itself knows nothing of it.

On a GPU every border of a phase waits for the device, which takes overlap away: phases come from steps of their own,
and their sum may exceed the time of a step that runs freely. The report says by how much.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.tensor_parallel import layers, mappings

from megabagel.bench.stopwatch import Stopwatch
from megabagel.model.vit import Vit
from megabagel.runtime.device import current_device
from megabagel.train.trainer import Trainer

PHASES = (
    "data",
    "inputs",
    "vae",
    "vit",
    "forward",
    "backward",
    "communication",
    "pipeline wait",
    "optimizer",
    "rest",
)
"""data: waiting for the loader. inputs: rows, masks, noise. vae: encoding images. vit: the tower's forward. forward,
backward: the rest of both. communication: collectives of tensor, context and data parallelism. pipeline wait: for the
neighbour stages, transfer and bubble. optimizer: gradient norm, update and averages. rest: losses, agreements,
bookkeeping."""

_COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast")
_BY_VALUE = ("dist_all_gather_func", "dist_reduce_scatter_func")
"""Names under which modules of megatron-core keep collectives of their own."""
_TRANSFERS = [name for name in vars(P2PCommunicator) if name.startswith(("recv_", "send_"))]


@contextmanager
def watched(trainer: Trainer) -> Iterator[Stopwatch]:
    """A stopwatch that runs while the trainer's steps do."""
    cuda = current_device().type == "cuda"
    watch = Stopwatch(torch.cuda.synchronize) if cuda else Stopwatch()

    def wrap(owner: Any, name: str, phase: str) -> None:
        stack.enter_context(patch.object(owner, name, watch.timed(phase, getattr(owner, name))))

    with ExitStack() as stack:
        wrap(trainer.builder, "build", "inputs")
        if trainer.builder.codec is not None:
            wrap(trainer.builder.codec, "moments", "vae")
            wrap(trainer.builder.codec, "draw", "vae")
        for chunk in trainer.optimizer.chunks:
            wrap(chunk, "forward", "forward")
            for tower in (module for module in chunk.modules() if isinstance(module, Vit)):
                wrap(tower, "forward", "vit")
        wrap(schedules, "backward_step", "backward")
        wrap(trainer.optimizer, "gradient_norm", "optimizer")
        wrap(trainer.optimizer, "update", "optimizer")
        for name in _COLLECTIVES:
            wrap(dist, name, "communication")
        for module in (layers, mappings, param_and_grad_buffer):
            for name in _BY_VALUE:
                if hasattr(module, name):
                    wrap(module, name, "communication")
        for name in _TRANSFERS:
            wrap(P2PCommunicator, name, "pipeline wait")
        yield watch
