"""Checks of a complete config: range of each number, paths, rules between fields, grid against world size."""

from collections.abc import Collection

from megabagel.config import data_rules, held_out_rules, model_rules
from megabagel.config.paths import unexpanded
from megabagel.config.ranges import out_of_range
from megabagel.config.rules import Rule, nearest_multiples
from megabagel.config.schema import Config
from megabagel.config.typed import pattern
from megabagel.errors import UserError

RULES = tuple(
    item for room in (model_rules, data_rules, held_out_rules) for item in vars(room).values() if isinstance(item, Rule)
)


def violations(config: Config, doubtful: Collection[str] = ()) -> list[str]:
    """Return one line per problem of `config`, with keys, values and the next step.

    Args:
        config: the tree, complete.
        doubtful: dotted keys whose value was not understood and replaced by the default.
    """
    # Rules that read a doubtful key or a number outside its range are skipped: their messages would describe a
    # consequence of the first mistake instead of the mistake.
    lines = []
    wrong = {pattern(key) for key in doubtful}
    found = [*out_of_range(config), *unexpanded(config)]
    for key, line in found:
        if not _touches(pattern(key), wrong):
            lines.append(line)
    wrong |= {pattern(key) for key, _ in found}
    for rule in RULES:
        if not any(_touches(key, wrong) for key in rule.keys):
            lines += rule.messages(config)
    return lines


def _touches(key: str, wrong: Collection[str]) -> bool:
    """Whether `key`, a section that contains it or a key inside it is among `wrong`."""
    return any(key == other or key.startswith(f"{other}.") or other.startswith(f"{key}.") for other in wrong)


def check_world(config: Config, world_size: int) -> int:
    """Return the data-parallel size of a job.

    Raises:
        UserError: `world_size` is no multiple of tp * pp * cp, or packs do not divide evenly over replicas.
    """
    p, packs = config.parallel, config.train.packs_per_step
    grid = p.tp * p.pp * p.cp
    if world_size % grid:
        raise UserError(
            f"world size = {world_size}, parallel.tp = {p.tp}, parallel.pp = {p.pp}, parallel.cp = {p.cp}: one replica "
            f"takes tp x pp x cp = {grid} ranks. Start {nearest_multiples(world_size, grid)} ranks, or change the grid."
        )
    dp = world_size // grid
    unit = dp * p.pp if p.vpp > 1 else dp
    if packs % unit:
        why = f"micro-batches of each of the dp = {dp} replicas are a multiple of pp when vpp > 1"
        raise UserError(
            f"train.packs_per_step = {packs}, world size = {world_size}, parallel.tp = {p.tp}, parallel.pp = {p.pp}, "
            f"parallel.vpp = {p.vpp}, parallel.cp = {p.cp}: "
            f"{why if p.vpp > 1 else f'each of the dp = {dp} replicas takes the same number of packs'}. "
            f"Set train.packs_per_step to {nearest_multiples(packs, unit)}."
        )
    return dp
