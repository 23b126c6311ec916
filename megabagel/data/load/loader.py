"""Data loader: packed batches of this rank's share of every step, prepared ahead of training.

With `data.workers` = 0 a background thread plans and fills the packs. With N workers, one planner process plans and N
worker processes fill packs; the training process only receives results, so data loading takes no time of its
interpreter.

At most `data.prefetch` finished steps wait beside the one in training (with a thread, one more may be in the making).
The batches are the same in every case: their order comes from the global plan, and results are received in that order.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from megabagel.config.schema import Config
from megabagel.data.decode import DecodeEngine
from megabagel.data.documents import Cell, Item, Loose, Member, Passage, TextItem
from megabagel.data.formats.reader import Reader
from megabagel.data.load.collate import Filled, Filler
from megabagel.data.load.latents import LatentCache
from megabagel.data.load.workers import Worker
from megabagel.data.plan.global_plan import GlobalPlan, StepPlan
from megabagel.data.plan.planned_sample import Task
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.keys import SampleKey

logger = logging.getLogger(__name__)

NAMED = 8
"""Most samples and files of a pack that an error message lists."""

LostImage = tuple[SampleKey, int]
"""Key of the visit and slot of an image."""


@dataclass(frozen=True)
class Step:
    """One optimizer step: its plan, and the packed batches of this rank, one per micro-batch."""

    plan: StepPlan
    batches: list[PackedBatch]
    lost: frozenset[LostImage]
    """Images (and texts) of this rank's batches that could not be read."""
    waited: float = 0.0
    """Seconds that training waited for the data of this step, on the slowest rank."""
    own_wait: float = 0.0
    """Seconds that this rank waited for its own part."""


class Loader:
    """Iterator over the steps of a run for one data-parallel rank."""

    def __init__(
        self,
        plan: GlobalPlan,
        tokenizer: TextTokenizer,
        decode: DecodeEngine,
        config: Config,
        batches: BatchBuilder,
        dp: tuple[int, int] = (0, 1),
        latents: LatentCache | None = None,
    ) -> None:
        """Set up loading; no thread or process starts before `steps` is called.

        Args:
            plan: global plan; its state is the position from which steps are prepared.
            tokenizer: encodes texts.
            decode: decodes image files.
            config: workers, prefetch and sizes.
            batches: builds the batch of this rank from a pack.
            dp: data-parallel (rank, size).
            latents: cache of VAE moments that replaces pixels for the VAE, or None.
        """
        self.plan, self.config, self.dp = plan, config, dp
        self.filler = Filler.of(plan, tokenizer, decode, batches, latents)

    def steps(self, count: int) -> Iterator[Step]:
        """Iterate over the next `count` steps, prepared ahead.

        Raises:
            UserError: a shard is missing or has changed, or a worker died.
            Exception: any error of the loading thread or of a worker, raised here at the step that it affects.
        """
        data, packs = self.config.data, self.config.train.packs_per_step // self.dp[1]
        who = f"{data.workers} workers and a planner" if data.workers else "a thread"
        ahead = data.prefetch + (1 if data.workers else 2)
        most = packs * ahead * self.filler.most_bytes / 2**30
        logger.info("data: %s in every rank, %d steps ahead, at most %.2f GiB of images", who, data.prefetch, most)
        return self._from_workers(count) if data.workers else self._from_thread(count)

    def _from_thread(self, count: int) -> Iterator[Step]:
        ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=self.config.data.prefetch)
        stopped = threading.Event()

        def produce() -> None:
            for _ in range(count):
                item: Step | BaseException
                try:
                    plan = self.plan.next_step()
                    tasks = [self.plan.task(plan, number) for number in plan.share(*self.dp)]
                    item = _step(plan, [self.filler(task) for task in tasks])
                except BaseException as error:
                    item = error
                # With a timeout: a consumer that has stopped no longer empties the queue; `put` would block for ever.
                while not stopped.is_set():
                    try:
                        ready.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set() or isinstance(item, BaseException):
                    return

        threading.Thread(target=produce, name="loader", daemon=True).start()
        try:
            for _ in range(count):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()

    def _from_workers(self, count: int) -> Iterator[Step]:
        """Steps from worker processes. Tasks go to the fillers round robin, so results are due in the same order."""
        with ExitStack() as stack:
            state = self.plan.state()
            # The planner process advances its own copy of the plan. When iteration ends, this process's copy is set to
            # the state after the last step that was delivered. A lambda, because `state` is rebound below.
            stack.callback(lambda: self.plan.load_state(state))
            planner = stack.enter_context(
                self._worker("planner", _Planning(self.plan), lambda number: f"step {number}")
            )
            fillers = [
                stack.enter_context(self._worker(f"worker {number}", self.filler, self._describe))
                for number in range(self.config.data.workers)
            ]
            asked = sent = taken = 0
            first, planned = self.plan.step, deque[StepPlan]()
            for step in range(count):
                # Planning runs one step ahead of filling, so that the planner works while packs are filled.
                while asked < min(count, step + self.config.data.prefetch + 2):
                    planner.send(first + asked)
                    asked += 1
                while len(planned) < min(count - step, self.config.data.prefetch + 1):
                    planned.append(planner.receive())
                    for number in planned[-1].share(*self.dp):
                        fillers[sent % len(fillers)].send(self.plan.task(planned[-1], number))
                        sent += 1
                plan, filled = planned.popleft(), []
                for _ in plan.share(*self.dp):
                    filled.append(fillers[taken % len(fillers)].receive())
                    taken += 1
                state = plan.state
                yield _step(plan, filled)

    def _worker(self, name: str, work: Callable[[Any], Any], describe: Callable[[Any], str]) -> Worker:
        plan = self.filler.batches.plan_attention
        # Imported once in the fork server instead of once per worker. `plan_attention` may be a functools.partial,
        # whose function is in `func`.
        modules = (Filler.__module__, getattr(plan, "func", plan).__module__)
        return Worker(name, work, describe, self.config.data.worker_timeout, logger.warning, modules)

    def _describe(self, task: Task) -> str:
        """Description of a pack for messages: its number, samples and files."""
        samples = [
            f"{visit.key.source}/{document.key}"
            for visit, document in zip(task.plan.visits, task.documents, strict=True)
        ]
        files = {
            _file(item, self.plan.sources[visit.key.source].index.reader)
            for visit, document in zip(task.plan.visits, task.documents, strict=True)
            for item in document.items
        }
        named, where = _few(samples), _few(sorted(files - {""}))
        return f"pack {task.pack} of step {task.step + 1} ({len(samples)} samples: {named}; files: {where})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _file(item: Item, reader: Reader) -> str:
    """Name of the file that holds an item; empty for a short text, which the index itself holds."""
    place = item.source if isinstance(item, TextItem) else item.member
    match place.place if isinstance(place, Passage) else place:
        case str():
            return ""
        case Loose(path):
            return path
        case Member(shard) | Cell(shard):
            return reader.shards[shard].name


class _Planning:
    """Work function of the planner process: plans the next step of its own copy of the plan."""

    def __init__(self, plan: GlobalPlan) -> None:
        self.plan = plan

    def __call__(self, number: int) -> StepPlan:
        # Steps can only be planned in order; the number is sent for messages and for this check.
        assert number == self.plan.step
        return self.plan.next_step()


def _step(plan: StepPlan, filled: list[Filled]) -> Step:
    """Assemble a step, and log every image that was lost."""
    lost = [image for pack in filled for image in pack.lost]
    for image in lost:
        logger.warning("%s", image.message)
    return Step(plan, [pack.batch for pack in filled], frozenset((image.key, image.slot) for image in lost))
