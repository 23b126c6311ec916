"""Dry run of a large job in one process: build ranks one after the other on the meta device and compare them.

Checks: (1) the optimizer's flat ranges of all ranks with the same weights tile each local parameter, (2) the local
parameters of one replica tile every tensor of the whole model, each over all its tensor- and pipeline-parallel ranks,
and (3) the ranks of a model-parallel group derive the same packs, layouts, numbers of und rows and shapes of stage
activations.
"""

import re
import resource
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megabagel.config.checks import check_world
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.model.shapes_only import model_shapes
from megabagel.planner.consistency import Derived, Place, derive, disagreements
from megabagel.planner.fake_rank import FakeRank, rehearse
from megabagel.planner.report import table
from megabagel.planner.tiling import holes, whole_tensors
from megabagel.planner.workload import Workload, typical_workload

PACKS = 8
"""Typical packs that stand for those of a step."""
SHOWN = 20
"""Findings printed; there may be one per tensor."""


@dataclass(frozen=True)
class Outcome:
    """Report of a dry run, and its findings (empty: the job can start)."""

    text: str
    findings: tuple[str, ...]


def dry_run(config: Config, world_size: int, ranks: str) -> Outcome:
    """Build and compare the ranks of a job. `ranks` lists those shown in the table, such as `0,17,last`.

    Raises UserError where the grid does not fit the world size, or a rank is not in it.
    """
    started = time.perf_counter()
    dp_size = check_world(config, world_size)
    chosen = chosen_ranks(ranks, world_size)
    workload = typical_workload(config, PACKS)
    replica = {place: rehearse(config, world_size, place.rank(config, dp_size)) for place in _replica(config)}
    shown = {rank: Place.of(rank, config, dp_size) for rank in chosen}
    built = {place: replica.get(place) or rehearse(config, world_size, rank) for rank, place in shown.items()}
    derived, findings = _compare(config, workload, dp_size, replica | built)
    text = "\n".join([
        f"{world_size} ranks: {next(iter(replica.values())).mesh.describe()}",
        f"built {len(replica | built)} of them, every tensor- and pipeline-parallel place at least once",
        "",
        _table(shown, built, derived),
        "",
        _verdict(findings, world_size),
        f"{time.perf_counter() - started:.1f} s, {host_memory():.2f} GiB of host memory at most",
    ])  # fmt: skip
    return Outcome(text, tuple(findings))


def host_memory() -> float:
    """Peak CPU memory of this process, GiB; works beside a GPU too."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def chosen_ranks(words: str, world_size: int) -> list[int]:
    """Ranks named by a list with commas; `last` is the last one."""
    ranks = []
    for word in words.split(","):
        word = word.strip()
        if not (word == "last" or re.fullmatch(r"\d+", word)) or (word != "last" and int(word) >= world_size):
            raise UserError(
                f"--ranks {words}: {word!r}: expected numbers below {world_size}, or last, with commas between"
            )
        ranks.append(world_size - 1 if word == "last" else int(word))
    return list(dict.fromkeys(ranks))


def _replica(config: Config) -> Iterator[Place]:
    """The places of one replica that hold different weights: every tp and pp rank, with cp and dp rank 0."""
    for pp in range(config.parallel.pp):
        for tp in range(config.parallel.tp):
            yield Place(tp, 0, 0, pp)


def _compare(
    config: Config, workload: Workload, dp_size: int, built: Mapping[Place, FakeRank]
) -> tuple[dict[Place, Derived], list[str]]:
    """Run checks 1 to 3; return what each rank derived from the plan, and all findings."""
    findings: list[str] = []
    for place, rank in built.items():
        grid = rank.mesh
        if Place(grid.tp.rank, grid.cp.rank, grid.dp.rank, grid.pp.rank) != place:
            findings.append(f"rank {grid.world.rank}: megatron-core places it elsewhere than at {place}")
        for name, (size, intervals) in rank.flat.items():
            findings += holes(f"{name} at {place} over {grid.dp_cp.size} replicas", size, intervals)
    held = [(place.pp, place.tp, built[place].pieces) for place in _replica(config)]
    findings += whole_tensors(model_shapes(config.model), held)
    derived: dict[Place, Derived] = {}
    for dp in sorted({place.dp for place in built}):
        group = [derive(config, workload, place, dp_size) for place in _group(config, dp)]
        findings += disagreements(group, config, next(iter(built.values())).wire_shape)
        derived |= {one.place: one for one in group}
    return derived, findings


def _group(config: Config, dp: int) -> Iterator[Place]:
    """A model-parallel group: every rank that works on the same pack."""
    p = config.parallel
    for pp in range(p.pp):
        for cp in range(p.cp):
            for tp in range(p.tp):
                yield Place(tp, cp, dp, pp)


def _table(shown: Mapping[int, Place], built: Mapping[Place, FakeRank], derived: Mapping[Place, Derived]) -> str:
    rows = [("rank", "tp", "pp", "cp", "dp", "layers", "weights M", "shard M", "boxes", "und | gen rows", "wire")]
    for rank, place in shown.items():
        one, plan = built[place], derived[place]
        layers = " ".join(f"{part.start}-{part.stop - 1}" if part else "none" for part in one.layers)
        rows.append((
            f"{rank}", f"{place.tp}", f"{place.pp}", f"{place.cp}", f"{place.dp}", layers,
            f"{one.parameters / 1e6:,.1f}",
            f"{one.shard_numbers / 1e6:,.2f}", f"{one.boxes}", f"{plan.border} | {plan.rows - plan.border}",
            " x ".join(map(str, one.wire_shape)),
        ))  # fmt: skip
    return table(rows)


def _verdict(findings: list[str], world_size: int) -> str:
    if not findings:
        return (
            "shards tile every parameter exactly once; the ranks of each model-parallel group looked at agree on "
            f"packs, layouts, borders and the wire: {world_size} ranks can start"
        )
    more = [f"... and {len(findings) - SHOWN} more"] if len(findings) > SHOWN else []
    return "\n".join([f"{len(findings)} findings:", *findings[:SHOWN], *more])
