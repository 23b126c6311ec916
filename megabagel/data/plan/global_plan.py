"""The global plan: which samples form which pack of which step, for the whole job (docs/architecture.md#five-ideas).

It is a pure function of (indices, config, seed, state). Every rank computes all of it and keeps its share, so the
number of ranks and workers has no influence on it. Its state is small JSON, the same on every rank.

The plan knows sizes alone; a pack is laid out by the rank that runs it (`visits.py`).
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
    """One entry of the mixture: its index and how its documents are used."""

    name: str
    task: str
    weight: float
    index: Index


def open_sources(config: Config, tokenizer: TextTokenizer) -> list[Source]:
    """Index every source of the mixture; the first call reads the shards, later ones the cache beside them."""
    return [
        Source(source.name, source.task, source.weight, index_source(config.data, source, tokenizer))
        for source in config.data.sources
    ]


@dataclass(frozen=True)
class StepPlan:
    """All packs of one optimizer step, and the plan's state and counters after it."""

    number: int
    packs: tuple[PackPlan, ...]
    flops: tuple[Flops, ...]
    """Per pack."""
    loads: tuple[float, ...]
    """Estimated time per pack, to balance ranks by."""
    state: dict[str, Any]
    skipped: dict[str, int]
    """Samples left out since the start, by reason."""

    @property
    def size(self) -> Size:
        """What the global batch amounts to."""
        return total(pack.size for pack in self.packs)

    def size_by_source(self) -> dict[str, Size]:
        """The same, by source; sources without a sample in it are left out."""
        sizes: dict[str, list[Size]] = {}
        for visit in (visit for pack in self.packs for visit in pack.visits):
            sizes.setdefault(visit.key.source, []).append(visit.size)
        return {name: total(parts) for name, parts in sizes.items()}

    def tokens_by_source(self) -> dict[str, tuple[int, int]]:
        """Tokens with (cross-entropy, flow loss) in the global batch, by source."""
        return {name: (size.ce_tokens, size.mse_tokens) for name, size in self.size_by_source().items()}

    def share(self, rank: int, size: int) -> list[int]:
        """Packs of one of `size` data-parallel ranks, in the order in which it runs them."""
        return [turn[rank] for turn in self.turns(size)]

    def turns(self, size: int) -> list[list[int]]:
        """The packs that `size` data-parallel ranks run at the same time, turn by turn: balanced by estimated time."""
        return turns(self.loads, size)

    def micro_steps(self, size: int) -> list[list[Size]]:
        """Sizes of the packs of every turn."""
        return [[self.packs[number].size for number in turn] for turn in self.turns(size)]


class GlobalPlan:
    """Draws samples from the mixture and packs them, one step after another."""

    def __init__(self, sources: Sequence[Source], config: Config) -> None:
        self.config, self.sources = config, {source.name: source for source in sources}
        self.rules = Rules.of(config)
        self.limit = config.data.max_sample_tokens or config.data.max_tokens
        weights = np.array([source.weight for source in sources], np.float64)
        shares = (weights / weights.sum()).cumsum()
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
        """The document behind a sample."""
        return self.sources[key.source].index.documents[key.sample]

    def task(self, step: StepPlan, pack: int) -> Task:
        """What is needed to fill one pack of a step."""
        plan = step.packs[pack]
        return Task(step.number, pack, plan, tuple(self.document(visit.key) for visit in plan.visits))

    def lay_out(self, pack: PackPlan) -> Pack:
        """A pack laid out."""
        return self.rules.pack(pack, [self.document(visit.key) for visit in pack.visits])

    def epochs(self) -> dict[str, float]:
        """How often each source has been gone through."""
        return {name: epoch + place / self._samples(name, epoch) for name, (epoch, place) in self.cursors.items()}

    def next_step(self) -> StepPlan:
        """Plan one step."""
        packs = tuple(self._next_pack() for _ in range(self.config.train.packs_per_step))
        flops = tuple(count_flops(pack.size, self.config.model) for pack in packs)
        loads = tuple(relative_time(pack.size, self.config.model) for pack in packs)
        self.step += 1
        return StepPlan(self.step - 1, packs, flops, loads, self.state(), dict(self.skipped))

    def state(self) -> dict[str, Any]:
        """Everything the plan needs to go on from here, as JSON values."""
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
        """What the state is valid for: the index of every source."""
        return {name: source.index.fingerprint for name, source in self.sources.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state. A source to which samples were appended finishes its epoch with the old ones.

        Raises:
            UserError: the sources have changed in another way since the state was made.
            WrongValue: it is no state of a plan.
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
        begun = {name: list(entry) for name, entry in saved.begun.items()}
        self.begun = {name: [self.cursors[name][0], known] for name, known in grown.items()} | begun
        for name, (epoch, place) in self.cursors.items():
            if place >= self._samples(name, epoch):
                raise WrongValue(f"plan.cursors.{name} is at sample {place} of {self._samples(name, epoch)}")
        self._orders = {}
        self.skipped = Counter(saved.skipped)
        window = (self._visit(SampleKey(seed, *entry)) for entry in saved.window)
        self.window = [visit for visit in window if self._fits(visit)]  # limits may have changed since

    def _next_pack(self) -> PackPlan:
        data = self.config.data
        while len(self.window) < data.lookahead:
            self.window.append(self._next_visit())
        chosen = set(choose_pack([visit.size.tokens for visit in self.window], data.min_tokens, data.max_tokens))
        pack = PackPlan.of(tuple(visit for index, visit in enumerate(self.window) if index in chosen))
        self.window = [visit for index, visit in enumerate(self.window) if index not in chosen]
        return pack

    def _next_visit(self) -> Visit:
        """The next sample that fits; others are counted and left out."""
        while True:
            draw = uniform(self.config.train.seed, "mixture", self.draws)
            self.draws += 1
            visit = self._visit(self._advance(self.names[bisect_right(self.bounds, draw)]))
            if self._fits(visit):
                return visit

    def _fits(self, visit: Visit) -> bool:
        """Whether a sample may enter a pack; one that may not is counted."""
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
        epoch, place = self.cursors[name]
        order = self._order(name, epoch)
        self.cursors[name] = [epoch, place + 1] if place + 1 < len(order) else [epoch + 1, 0]
        return SampleKey(self.config.train.seed, name, int(order[place]), epoch)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        """Shuffled sample numbers of one pass over a source."""
        if (name, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != name}
            shuffle = generator(self.config.train.seed, "order", name, epoch)
            self._orders[name, epoch] = shuffle.permutation(self._samples(name, epoch))
        return self._orders[name, epoch]

    def _samples(self, name: str, epoch: int) -> int:
        """Samples in one pass over a source."""
        begun = self.begun.get(name)
        return begun[1] if begun and begun[0] == epoch else len(self.sources[name].index.documents)

    def _visit(self, key: SampleKey) -> Visit:
        return self.rules.visit(key, self.document(key))

    def _check(self, source: Source) -> None:
        """Refuse a source of which no sample can ever enter a pack."""
        keys = (SampleKey(self.config.train.seed, source.name, i, 0) for i in range(len(source.index.documents)))
        if not any(0 < self._visit(key).size.tokens <= self.limit for key in keys):
            raise UserError(
                f"data.sources: none of the {len(source.index.documents)} samples of {source.name} fits into "
                f"{self.limit} tokens (data.max_sample_tokens or data.max_tokens): raise the limit, lower "
                "data.vae_resize / data.vit_resize, or leave the source out."
            )
