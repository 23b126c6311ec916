"""Inputs of a step's micro-batches, each built when the schedule first asks for it."""

from collections.abc import Callable, Sequence
from typing import Any, overload

from megabagel.model.inputs import StageInputs
from megabagel.runtime.phase import phase
from megabagel.sequence.batch import PackedBatch


class InputFeed(Sequence[StageInputs]):
    """Stage inputs of a step, built on first access and dropped once every model chunk has read them.

    Built all at once before the first forward pass, they would stay in device memory for the whole step: 75 MB per
    micro-batch of the 7B model, 14 GB at 192 micro-batches. On a GPU the host builds the next micro-batch while the
    device still computes the one before.

    Args:
        build: makes the inputs of a batch (`InputBuilder.build`). Collective over ranks that share the pack, which ask
            in the same order.
        batches: this rank's batches of the step.
        readers: how often every entry is read: the number of model chunks.
    """

    def __init__(
        self, build: Callable[[PackedBatch], StageInputs], batches: Sequence[PackedBatch], readers: int
    ) -> None:
        self._build, self._batches, self._readers = build, batches, readers
        self._held: dict[int, tuple[StageInputs, int]] = {}
        """Inputs and the number of reads left, by index."""

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> StageInputs: ...
    @overload
    def __getitem__(self, index: slice) -> list[StageInputs]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):  # for a check of some micro-batches before the step: not held for it
            return [self._made(number) for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        inputs, left = self._held.pop(index) if index in self._held else (self._made(index), self._readers)
        if left > 1:
            self._held[index] = inputs, left - 1
        return inputs

    def _made(self, number: int) -> StageInputs:
        # Not counted as progress: with interleaved stages ranks reach a micro-batch at different moments of the step.
        with phase("inputs", counted=False):
            return self._build(self._batches[number])
