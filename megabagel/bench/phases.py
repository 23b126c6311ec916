"""Where a training step's time goes: a stopwatch that listens to the phases of a run (`parallel.phase`).

On a GPU every border of a phase waits for the device, which takes overlap away: phases come from steps of their own,
and their sum may exceed the time of a step that runs freely. The report says by how much.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megabagel.bench.collectives import collectives_as_phases
from megabagel.bench.stopwatch import Stopwatch
from megabagel.runtime import phase
from megabagel.runtime.device import current_device

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
neighbour stages, transfer and bubble. optimizer: gradient norm, update and averages. rest: every other phase (losses,
gradients but for their collectives, bookkeeping), and what is in none."""


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """A stopwatch that measures the phases of everything inside."""
    watch = Stopwatch(torch.cuda.synchronize) if current_device().type == "cuda" else Stopwatch()
    phase.listeners.append(watch.phase)
    try:
        with collectives_as_phases("communication"), watch.phase("rest"):
            yield watch
    finally:
        phase.listeners.remove(watch.phase)


def by_phase(watch: Stopwatch) -> dict[str, float]:
    """Seconds of every phase in PHASES; those of all others count for `rest`."""
    found = {name: watch.seconds[name] for name in PHASES[:-1]}
    return found | {"rest": sum(watch.seconds.values()) - sum(found.values())}
