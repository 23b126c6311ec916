"""State of one sub-case of an `infer_*` case: its sessions, and the comparisons so far."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.inference.contexts import Context
from megabagel.inference.engine import Engine
from megabagel.inference.programs import Program, Session
from megabagel.model.vae_flux import FluxCodec
from megabagel.parallel.mesh import Mesh
from megabagel.parity.case import Case
from megabagel.parity.comparisons import Gates, Row, compare


@dataclass
class SubCase:
    """One entry of `sub_cases`, run op by op."""

    tag: str
    about: dict[str, Any]
    case: Case
    engine: Engine
    config: Config
    mesh: Mesh
    gates: Gates
    codec: FluxCodec | None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    sessions: list[Session] = field(default_factory=list)
    """One per sequence of the batch."""
    context_of: list[dict[Context, Context]] = field(default_factory=list)
    """Per sequence: the case's op numbers of a context -> ours."""
    pictures: list[np.ndarray] = field(default_factory=list)
    """Decoded so far."""
    found: list[Row] = field(default_factory=list)

    def check(self, name: str, ours: Any, exact: bool = False) -> None:
        """Compare with the case's entry, if it has one."""
        if name in self.tensors:
            theirs = self.tensors[name]
            gate = self.gates.exact if exact else self.gates.block
            self.found.append(compare(f"{self.tag}/{name}", ours, theirs, gate))

    def fact(self, name: str, ours: Any, theirs: Any) -> None:
        """Compare numbers of the JSON file."""
        if theirs is not None:
            row = compare(f"{self.tag}/{name}", torch.as_tensor(ours), torch.as_tensor(theirs), self.gates.exact)
            self.found.append(row)

    def run(self, program: Program[Any]) -> tuple[list[Any], Any]:
        """Run a program of the first session; (its events, its result)."""
        request = self.engine.submit(program, self.sessions[0], need=0, ends_session=False)
        events: list[Any] = []
        while request.done is None:
            events += [event for _, event in self.engine.step()]
        if request.done.error:
            raise UserError(f"{self.case.path}: {self.tag}: {request.done.error}")
        return events[:-1], request.done.result

    def compare_cache(self, prefix: str, rows: np.ndarray) -> None:
        """Keys and values of cache rows in the layers that the case has, whole on rank 0."""
        cache, where = self.engine.cache, torch.from_numpy(rows)
        names = [
            n
            for n in self.tensors
            if n.startswith(prefix) and n[len(prefix) :][:1] in "kv" and n[len(prefix) + 1 :].isdigit()
        ]
        for name in names:
            layer = int(name[len(prefix) + 1 :])
            pool = cache.keys if name[len(prefix)] == "k" else cache.values
            self.check(name, self.gathered(pool[layer].cpu()[where] if layer in pool else None))

    def gathered(self, mine: Tensor | None) -> Tensor | None:
        """Heads of all tensor-parallel ranks of the stage that has the layer."""
        grid = self.mesh
        if grid.world.size == grid.dp.size:
            return mine
        place = (grid.cp.rank, grid.dp.rank, grid.tp.rank)
        everyone: list[Any] = [None] * grid.world.size
        dist.all_gather_object(everyone, (place, mine))
        found = sorted((tp, x) for (cp, dp, tp), x in everyone if cp == dp == 0 and x is not None)
        return torch.cat([x for _, x in found], 1)
