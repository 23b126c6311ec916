"""The global plan: assignment of samples to packs and of packs to steps (docs/architecture.md#five-ideas).

The plan is a pure function of (indexes, config, seed, state). Every rank computes the plan of the whole job and keeps
its share, so the number of ranks and workers has no influence on the order of data, and a run resumes on another grid.
The state is a few kB of JSON, the same on every rank.

The plan works on token counts only; the rank that trains on a pack lays it out (`planned_sample.py`). A visit is one
use of a sample in one epoch.
"""

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megabagel.config.schema import Config
from megabagel.config.typed_json import WrongValue, read_as
from megabagel.data.documents import Document
from megabagel.data.index.index import Index, index_source
from megabagel.data.plan.planned_sample import PackPlan, Rules, Task, Visit
from megabagel.data.plan.resume_check import grown_sources
from megabagel.data.plan_state import PlanState
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.errors import UserError
from megabagel.log import RANK0
from megabagel.sequence.flops import Flops, count_flops, relative_time
from megabagel.sequence.keys import SampleKey, generator, uniform
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import choose_pack, turns
from megabagel.sequence.sizes import Size, total

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """One entry of the data mixture: its index, its task and its sampling weight."""

    name: str
    task: str
    weight: float
    index: Index


def open_sources(config: Config, tokenizer: TextTokenizer) -> list[Source]:
    """Index every source of the mixture. The first call reads all shards; later calls read the cached scans."""
    return [
        Source(source.name, source.task, source.weight, index_source(config.data, source, tokenizer))
        for source in config.data.sources
    ]


@dataclass(frozen=True)
class StepPlan:
    """All packs of one optimizer step, and the state of the plan after it."""

    number: int
    packs: tuple[PackPlan, ...]
    flops: tuple[Flops, ...]
    """FLOPs of each pack."""
    loads: tuple[float, ...]
    """Estimated relative time of each pack; data-parallel ranks are balanced by it."""
    # Stored with every step: packs are prepared ahead, so the plan object is past the step that is being trained.
    state: dict[str, Any]
    skipped: dict[str, int]
    """Samples left out since the start of the run, by source and reason."""

    @property
    def size(self) -> Size:
        """Token counts and work of the global batch."""
        return total(pack.size for pack in self.packs)

    def size_by_source(self) -> dict[str, Size]:
        """Size of the global batch per source; sources without a sample in the step are absent."""
        sizes: dict[str, list[Size]] = {}
        for visit in (visit for pack in self.packs for visit in pack.visits):
            sizes.setdefault(visit.key.source, []).append(visit.size)
        return {name: total(parts) for name, parts in sizes.items()}

    def tokens_by_source(self) -> dict[str, tuple[int, int]]:
        """Numbers of tokens with (cross-entropy, flow loss) in the global batch, per source."""
        return {name: (size.ce_tokens, size.mse_tokens) for name, size in self.size_by_source().items()}

    def share(self, rank: int, size: int) -> list[int]:
        """Pack numbers of data-parallel rank `rank` of `size`, in the order in which it runs them."""
        return [turn[rank] for turn in self.turns(size)]

    def turns(self, size: int) -> list[list[int]]:
        """Pack numbers by turn: the packs that `size` data-parallel ranks run at once, balanced by estimated time."""
        return turns(self.loads, size)

    def micro_steps(self, size: int) -> list[list[Size]]:
        """Sizes of the packs, arranged as in `turns`."""
        return [[self.packs[number].size for number in turn] for turn in self.turns(size)]


class GlobalPlan:
    """Sequential planner: draws samples from the mixture and packs them, step by step.

    Args:
        sources: the opened sources, in the order of the config.
        config: sizes, limits, seed and packs per step.

    Raises:
        UserError: a source has no sample that fits into a pack.
    """

    def __init__(self, sources: Sequence[Source], config: Config) -> None:
        self.config, self.sources = config, {source.name: source for source in sources}
        self.rules = Rules.of(config)
        self.limit = config.data.max_sample_tokens or config.data.max_tokens
        weights = np.array([source.weight for source in sources], np.float64)
        shares = (weights / weights.sum()).cumsum()
        # Divided once more so that the last bound is exactly 1: rounding in the sum may leave it slightly below.
        self.names, self.bounds = list(self.sources), (shares / shares[-1]).tolist()
        self.step, self.draws = 0, 0
        self.cursors = {name: [0, 0] for name in self.sources}  # epoch, place in the epoch's order
        self.begun: dict[str, list[int]] = {}  # of sources that grew: epoch, samples with which it began
        self.window: list[Visit] = []
        self.skipped: Counter[str] = Counter()
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        for source in sources:
            self._check(source)

    def document(self, key: SampleKey) -> Document:
        """The document of a visit."""
        return self.sources[key.source].index.documents[key.sample]

    def task(self, step: StepPlan, pack: int) -> Task:
        """The work order by which a loader worker fills pack number `pack` of a step."""
        plan = step.packs[pack]
        return Task(step.number, pack, plan, tuple(self.document(visit.key) for visit in plan.visits))

    def lay_out(self, pack: PackPlan) -> Pack:
        """Lay out a pack: see `Rules.pack`."""
        return self.rules.pack(pack, [self.document(visit.key) for visit in pack.visits])

    def epochs(self) -> dict[str, float]:
        """Number of passes over each source so far, as a fraction."""
        return {name: epoch + place / self._samples(name, epoch) for name, (epoch, place) in self.cursors.items()}

    def next_step(self) -> StepPlan:
        """Plan the next step and advance the state."""
        packs = tuple(self._next_pack() for _ in range(self.config.train.packs_per_step))
        flops = tuple(count_flops(pack.size, self.config.model) for pack in packs)
        loads = tuple(relative_time(pack.size, self.config.model) for pack in packs)
        self.step += 1
        return StepPlan(self.step - 1, packs, flops, loads, self.state(), dict(self.skipped))

    def state(self) -> dict[str, Any]:
        """Complete state of the plan as JSON values; see `PlanState`."""
        return {
            "fingerprint": self.fingerprint(),
            "seed": self.config.train.seed,
            "step": self.step,
            "draws": self.draws,
            "cursors": {name: list(cursor) for name, cursor in self.cursors.items()},
            "begun": {name: list(begun) for name, begun in self.begun.items() if begun[0] == self.cursors[name][0]},
            "window": [[visit.key.source, visit.key.sample, visit.key.epoch] for visit in self.window],
            "skipped": dict(self.skipped),
        }

    def fingerprint(self) -> dict[str, str]:
        """Fingerprint of the index of every source; a state can be loaded only with the same or grown sources."""
        return {name: source.index.fingerprint for name, source in self.sources.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. A source to which samples were appended finishes its epoch with the old ones.

        Raises:
            UserError: the sources have changed in another way since the state was saved, or the seed differs.
            WrongValue: not a valid state of a plan.
        """
        saved = read_as(PlanState, state, "plan")
        grown = grown_sources({name: source.index for name, source in self.sources.items()}, saved.fingerprint)
        seed = self.config.train.seed
        if saved.seed != seed:
            raise UserError(
                f"train.seed={seed}, but the checkpoint's place in the data was reached with {saved.seed}: set "
                f"train.seed={saved.seed}, or start anew with run.resume=none"
            )
        samples = {name: len(source.index.documents) for name, source in self.sources.items()}
        saved.check(samples)
        self.step, self.draws = saved.step, saved.draws
        self.cursors = {name: list(cursor) for name, cursor in saved.cursors.items()}
        # An epoch begun before the samples were appended keeps its old length, else the shuffle of the epoch would
        # change and samples would be repeated or skipped. Entries of the state win: the source may have grown twice.
        begun = {name: list(entry) for name, entry in saved.begun.items()}
        self.begun = {name: [self.cursors[name][0], known] for name, known in grown.items()} | begun
        for name, (epoch, place) in self.cursors.items():
            if place >= self._samples(name, epoch):
                raise WrongValue(f"plan.cursors.{name} is at sample {place} of {self._samples(name, epoch)}")
        self._orders = {}
        self.skipped = Counter(saved.skipped)
        window = (self._visit(SampleKey(seed, *entry)) for entry in saved.window)
        # Limits may have changed since the state was saved.
        self.window = [visit for visit in window if self._fits(visit)]

    def _next_pack(self) -> PackPlan:
        data = self.config.data
        while len(self.window) < data.lookahead:
            self.window.append(self._next_visit())
        chosen = set(choose_pack([visit.size.tokens for visit in self.window], data.min_tokens, data.max_tokens))
        pack = PackPlan.of(tuple(visit for index, visit in enumerate(self.window) if index in chosen))
        self.window = [visit for index, visit in enumerate(self.window) if index not in chosen]
        return pack

    def _next_visit(self) -> Visit:
        """The next sample that fits into a pack; others are counted and left out."""
        while True:
            # Keyed by the number of the draw: the state is one integer, and no generator has to be saved.
            draw = uniform(self.config.train.seed, "mixture", self.draws)
            self.draws += 1
            visit = self._visit(self._advance(self.names[bisect_right(self.bounds, draw)]))
            if self._fits(visit):
                return visit

    def _fits(self, visit: Visit) -> bool:
        """Return whether a sample may enter a pack, and count it if it may not."""
        key, tokens = visit.key, visit.size.tokens
        if 0 < tokens <= self.limit:
            return True
        reason = "longer than the window" if tokens else "nothing left after dropout"
        if not self.skipped[f"{key.source}: {reason}"]:
            logger.warning(
                "source %s: sample %s has %d tokens, limit %d: left out (%s); further ones are only counted",
                *(key.source, self.document(key).key, tokens, self.limit, reason),
                extra=RANK0,
            )
        self.skipped[f"{key.source}: {reason}"] += 1
        return False

    def _advance(self, name: str) -> SampleKey:
        """The next sample of a source; moves its cursor, past the end of an epoch to the start of the next one."""
        epoch, place = self.cursors[name]
        order = self._order(name, epoch)
        self.cursors[name] = [epoch, place + 1] if place + 1 < len(order) else [epoch + 1, 0]
        return SampleKey(self.config.train.seed, name, int(order[place]), epoch)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """int64 [samples]: shuffled sample numbers of one epoch of a source."""
        if (name, epoch) not in self._orders:
            # One order per source is kept: cursors only move forward.
            self._orders = {key: order for key, order in self._orders.items() if key[0] != name}
            shuffle = generator(self.config.train.seed, "order", name, epoch)
            self._orders[name, epoch] = shuffle.permutation(self._samples(name, epoch))
        return self._orders[name, epoch]

    def _samples(self, name: str, epoch: int) -> int:
        """Number of samples in one epoch of a source."""
        begun = self.begun.get(name)
        return begun[1] if begun and begun[0] == epoch else len(self.sources[name].index.documents)

    def _visit(self, key: SampleKey) -> Visit:
        return self.rules.visit(key, self.document(key))

    def _check(self, source: Source) -> None:
        """Raise UserError for a source without a sample that fits: drawing from it would never end."""
        keys = (SampleKey(self.config.train.seed, source.name, i, 0) for i in range(len(source.index.documents)))
        if not any(0 < self._visit(key).size.tokens <= self.limit for key in keys):
            raise UserError(
                f"data.sources: none of the {len(source.index.documents)} samples of {source.name} fits into "
                f"{self.limit} tokens (data.max_sample_tokens or data.max_tokens): raise the limit, lower "
                "data.vae_resize / data.vit_resize, or leave the source out."
            )
