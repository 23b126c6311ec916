"""Parallel grid of a run (sizes of all axes), and enumeration of the legal ones."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from megabagel.config.checks import RULES, check_world
from megabagel.config.schema import Config
from megabagel.errors import UserError

Recompute = Literal["none", "selective", "full"]
Precision = Literal["bf16", "fp32"]
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class Grid:
    """Sizes of the parallel axes, and the two settings that trade memory for time."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    recompute: Recompute
    precision: Precision

    @property
    def gpus(self) -> int:
        """Ranks of the job."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, over which optimizer state is sharded."""
        return self.dp * self.cp

    def apply(self, config: Config) -> Config:
        """The run on this grid."""
        parallel = replace(config.parallel, tp=self.tp, pp=self.pp, vpp=self.vpp, cp=self.cp, recompute=self.recompute)
        if (self.pp, self.vpp) != (config.parallel.pp, config.parallel.vpp):
            parallel = replace(parallel, layer_split=None)
        return replace(config, parallel=parallel, train=replace(config.train, precision=self.precision))

    def overrides(self, config: Config) -> str:
        """Command-line overrides that turn `config` into exactly `apply(config)`."""
        words = [f"parallel.{key}={value}" for key, value in (("tp", self.tp), ("pp", self.pp), ("cp", self.cp))]
        if self.vpp > 1 or config.parallel.vpp > 1:
            words.insert(2, f"parallel.vpp={self.vpp}")
        if self.apply(config).parallel.layer_split != config.parallel.layer_split:
            words.append("parallel.layer_split=null")
        words.append(f"parallel.recompute={self.recompute}")
        if self.precision != config.train.precision:
            words.append(f"train.precision={self.precision}")
        return " ".join(words)

    def __str__(self) -> str:
        vpp = f" (vpp {self.vpp})" if self.vpp > 1 else ""
        return f"tp {self.tp} x pp {self.pp}{vpp} x cp {self.cp} x dp {self.dp}, recompute {self.recompute}"


def grid_of(config: Config, gpus: int) -> Grid:
    """The grid that the config itself names. Raises UserError where it does not fit `gpus` GPUs."""
    p = config.parallel
    return Grid(p.tp, p.pp, p.vpp, p.cp, check_world(config, gpus), p.recompute, config.train.precision)


def why_illegal(config: Config, gpus: int) -> str | None:
    """First message of the config's rules against its grid on `gpus` GPUs; None if the grid is legal."""
    for rule in RULES:
        if any(key.startswith("parallel.") for key in rule.keys):
            for line in rule.messages(config):
                return line
    try:
        check_world(config, gpus)
    except UserError as error:
        return str(error)
    return None


def legal_grids(config: Config, gpus: int, precisions: tuple[Precision, ...]) -> Iterator[Grid]:
    """Every grid of `gpus` GPUs that the config's rules allow, in a fixed order.

    Interleaving is tried with chunks of equal depth only, where stages have them at all.
    """
    for tp, pp, cp in _shapes(config, gpus):
        for vpp in _chunks(config, pp):
            grid = Grid(tp, pp, vpp, cp, gpus // (tp * pp * cp), "none", config.train.precision)
            if why_illegal(grid.apply(config), gpus) is None:
                for precision in precisions:
                    for recompute in RECOMPUTE:
                        yield replace(grid, recompute=recompute, precision=precision)


def _shapes(config: Config, gpus: int) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, cp) whose product divides `gpus`."""
    divisors = [d for d in range(1, gpus + 1) if gpus % d == 0]
    for tp in (d for d in divisors if d <= config.model.kv_heads):
        for pp in (d for d in divisors if d <= config.model.layers and gpus % (tp * d) == 0):
            for cp in (d for d in divisors if gpus % (tp * pp * d) == 0 and d <= 64):
                yield tp, pp, cp


def _chunks(config: Config, pp: int) -> list[int]:
    """Model chunks per stage."""
    layers = config.model.layers
    return [v for v in range(1, layers // pp + 1) if v == 1 or (pp > 1 and layers % (pp * v) == 0)]
