"""The global plan: which samples form which pack of which step, for the whole job (architecture, idea 4).

It is a pure function of (indices, config, seed, state). Every rank computes all of it and keeps its share, so the
number of ranks and workers has no influence on it. Its state is small JSON, the same on every rank.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megabagel.config.schema import Config
from megabagel.data.documents import Document
from megabagel.data.expand import Expander
from megabagel.data.index import Index, index_source
from megabagel.data.tokenizer import TextTokenizer
from megabagel.errors import UserError
from megabagel.sequence.flops import Flops, count_flops
from megabagel.sequence.keys import SampleKey, generator
from megabagel.sequence.pack import Pack, build_pack
from megabagel.sequence.packing import choose_pack, deal
from megabagel.sequence.sample import Dropout, SamplePlan, plan_sample

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
    packs: tuple[Pack, ...]
    flops: tuple[Flops, ...]
    """Per pack."""
    state: dict[str, Any]
    skipped: dict[str, int]
    """Samples left out since the start, by reason."""

    def tokens_by_source(self) -> dict[str, tuple[int, int]]:
        """Tokens with (cross-entropy, flow loss) in the global batch, by source."""
        counts: dict[str, tuple[int, int]] = {}
        for sample in (sample for pack in self.packs for sample in pack.samples):
            ce, mse = counts.get(sample.key.source, (0, 0))
            noised = sum(image.rows * image.cols for image in sample.latents if image.noised)
            counts[sample.key.source] = (ce + int(sample.ce_S.sum()), mse + noised)
        return counts

    def share(self, rank: int, size: int) -> list[int]:
        """Packs of one data-parallel rank: equal counts, balanced by work."""
        return self._deal(size)[rank]

    def micro_steps(self, size: int) -> list[list[Pack]]:
        """The packs that `size` data-parallel ranks run at the same time, turn by turn."""
        return [[self.packs[number] for number in turn] for turn in zip(*self._deal(size), strict=True)]

    def _deal(self, size: int) -> list[list[int]]:
        return deal([flops.masked + flops.vit for flops in self.flops], size)


class GlobalPlan:
    """Draws samples from the mixture, lays them out and packs them, one step after another."""

    def __init__(self, sources: Sequence[Source], config: Config) -> None:
        self.config, self.sources = config, {source.name: source for source in sources}
        self.expander = Expander.of(config)
        data = config.data
        self.dropout = Dropout(data.drop_text, data.drop_vit, data.drop_latent)
        self.limit = data.max_sample_tokens or data.max_tokens
        self.weights = np.array([source.weight for source in sources], np.float64)
        self.weights /= self.weights.sum()
        self.step, self.draws = 0, 0
        self.cursors = {name: [0, 0] for name in self.sources}  # epoch, place in the epoch's order
        self.window: list[SamplePlan] = []
        self.skipped: Counter[str] = Counter()
        self._orders: dict[tuple[str, int], np.ndarray] = {}
        for source in sources:
            self._check(source)

    def document(self, key: SampleKey) -> Document:
        """The document behind a sample."""
        return self.sources[key.source].index.documents[key.sample]

    def next_step(self) -> StepPlan:
        """Plan one step."""
        packs = tuple(self._next_pack() for _ in range(self.config.train.packs_per_step))
        flops = tuple(count_flops(pack, self.config.model) for pack in packs)
        self.step += 1
        return StepPlan(self.step - 1, packs, flops, self.state(), dict(self.skipped))

    def state(self) -> dict[str, Any]:
        """Everything the plan needs to go on from here, as JSON values."""
        return {
            "fingerprint": self.fingerprint(),
            "seed": self.config.train.seed,
            "step": self.step,
            "draws": self.draws,
            "cursors": {name: list(cursor) for name, cursor in self.cursors.items()},
            "window": [[plan.key.source, plan.key.sample, plan.key.epoch] for plan in self.window],
            "skipped": dict(self.skipped),
        }

    def fingerprint(self) -> dict[str, str]:
        """What the state is valid for: the index of every source."""
        return {name: source.index.fingerprint for name, source in self.sources.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state. Raises UserError when the sources have changed since it was made."""
        mine, theirs = self.fingerprint(), state["fingerprint"]
        changed = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
        if changed:
            raise UserError(
                f"data.sources: {', '.join(changed)} changed since the checkpoint was written, so its place in the "
                "data means nothing there. Restore the shards, the tokenizer and the list of sources, or start anew "
                "with run.resume=none."
            )
        seed = self.config.train.seed
        if state["seed"] != seed:
            raise UserError(
                f"train.seed={seed}, but the checkpoint's place in the data was reached with {state['seed']}: set "
                f"train.seed={state['seed']}, or start anew with run.resume=none"
            )
        self.step, self.draws = state["step"], state["draws"]
        self.cursors = {name: list(cursor) for name, cursor in state["cursors"].items()}
        self.skipped = Counter(state["skipped"])
        window = (self._lay_out(SampleKey(seed, *entry)) for entry in state["window"])
        self.window = [plan for plan in window if self._fits(plan)]  # limits may have changed since

    def _next_pack(self) -> Pack:
        data = self.config.data
        while len(self.window) < data.lookahead:
            self.window.append(self._next_sample())
        chosen = set(choose_pack([plan.tokens for plan in self.window], data.min_tokens, data.max_tokens))
        pack = build_pack([plan for index, plan in enumerate(self.window) if index in chosen])
        self.window = [plan for index, plan in enumerate(self.window) if index not in chosen]
        return pack

    def _next_sample(self) -> SamplePlan:
        """The next sample that fits; others are counted and left out."""
        names = list(self.sources)
        while True:
            draw = generator(self.config.train.seed, "mixture", self.draws)
            name = names[int(draw.choice(len(names), p=self.weights))]
            self.draws += 1
            plan = self._lay_out(self._advance(name))
            if self._fits(plan):
                return plan

    def _fits(self, plan: SamplePlan) -> bool:
        """Whether a sample may enter a pack; one that may not is counted."""
        if 0 < plan.tokens <= self.limit:
            return True
        name = plan.key.source
        reason = "longer than the window" if plan.tokens else "nothing left after dropout"
        if not self.skipped[f"{name}: {reason}"]:
            logger.warning(
                "source %s: sample %s has %d tokens, limit %d: left out (%s); further ones are only counted",
                *(name, self.document(plan.key).key, plan.tokens, self.limit, reason),
            )
        self.skipped[f"{name}: {reason}"] += 1
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
            self._orders[name, epoch] = shuffle.permutation(len(self.sources[name].index.documents))
        return self._orders[name, epoch]

    def _lay_out(self, key: SampleKey) -> SamplePlan:
        items = self.expander.items(self.document(key), self.sources[key.source].task, key)
        return plan_sample(items, key, self.dropout, self.config.data.dropped_images_advance)

    def _check(self, source: Source) -> None:
        """Refuse a source of which no sample can ever enter a pack."""
        keys = (SampleKey(self.config.train.seed, source.name, i, 0) for i in range(len(source.index.documents)))
        if not any(0 < self._lay_out(key).tokens <= self.limit for key in keys):
            raise UserError(
                f"data.sources: none of the {len(source.index.documents)} samples of {source.name} fits into "
                f"{self.limit} tokens (data.max_sample_tokens or data.max_tokens): raise the limit, lower "
                "data.vae_resize / data.vit_resize, or leave the source out."
            )
