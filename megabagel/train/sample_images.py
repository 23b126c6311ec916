"""Interface of sample images during training: what `run.records` calls every `telemetry.sample_every` steps.

The engine is handed in by the command (`inference.training_samples`), so that training does not depend on inference.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from megabagel.config.schema import Config
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.model.bagel import Bagel
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.mesh import Mesh


class Sampler(Protocol):
    """Makes the samples that `telemetry` lists with the weights as they are at the moment."""

    def draw(self) -> dict[str, np.ndarray]:
        """Return caption -> picture, uint8 [height, width, 3], on rank 0. Collective: all ranks call it."""
        ...


class SamplerFactory(Protocol):
    """Builds the sampler of a run."""

    def __call__(
        self, config: Config, mesh: Mesh, chunks: Sequence[Bagel], tokenizer: TextTokenizer, builder: InputBuilder
    ) -> Sampler:
        """Return the sampler.

        Args:
            config: the run.
            mesh: its grid.
            chunks: this rank's model chunks, whose parameters the sampler reads.
            tokenizer: of the run.
            builder: of training's inputs; its image autoencoder, kernels and attention engine are used.

        Raises:
            UserError: a sample cannot be made.
        """
        ...
