"""Sample images during training: Euler steps through the training forward path, on the grid that trains.

Each prompt is a packed sample (text, noised image); with guidance a second sample has the image without the text. One
forward pass of the pack gives all velocities. Nothing is cached between steps, so this suits a few small pictures;
`megabagel.inference` has the KV cache. Sampler: docs/bagel.md#sampler. Shape letters: docs/notation.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist

from megabagel.config.schema import Config
from megabagel.data.tokenize.token_ids import Writer
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.errors import UserError
from megabagel.model.inputs import Outputs, StageInputs
from megabagel.model.noise import normal
from megabagel.parallel.inputs import InputBuilder, SamplerLatents
from megabagel.parallel.mesh import Mesh
from megabagel.sampling.guidance import extrapolated
from megabagel.sampling.timesteps import euler_step, shifted
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.items import Item, Latent, Text, item_tokens
from megabagel.sequence.keys import SampleKey, seed64
from megabagel.sequence.pack import build_pack
from megabagel.sequence.patches import unpatchify
from megabagel.sequence.sample import LATENT, Dropout, plan_sample

Evaluate = Callable[[StageInputs], Outputs | None]
"""One forward pass of the pipeline; outputs on the last stage, None elsewhere."""


@dataclass(frozen=True)
class _Canvas:
    """One packed batch: `prompts` samples with text, then as many without text if guided."""

    batch: PackedBatch
    prompts: tuple[str, ...]


class EulerSampler:
    """Sampler of `telemetry.prompts` with the current weights.

    Collective: all ranks call it and get the same images.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        batches: BatchBuilder,
        builder: InputBuilder,
        tokenizer: TextTokenizer,
        evaluate: Evaluate,
    ) -> None:
        """Plan the packs of all prompts.

        Args:
            config: prompts, picture size, steps and guidance are in `telemetry`.
            mesh: process groups of the job.
            batches: builds packed batches.
            builder: builds stage inputs; its codec decodes the latents and must be there.
            tokenizer: encodes the prompts.
            evaluate: one forward pass of the pipeline.

        Raises:
            UserError: a prompt with its picture does not fit into a pack.
        """
        self.config, self.mesh, self.batches, self.builder = config, mesh, batches, builder
        self.evaluate = evaluate
        self.tokenizer, self.writer = tokenizer, Writer(tokenizer)
        assert builder.codec is not None
        self.codec = builder.codec
        height, width = config.telemetry.sample_size
        self.rows, self.cols = height // config.model.latent_stride, width // config.model.latent_stride
        self.guided = config.telemetry.sample_guidance > 1
        self.canvases = self._canvases()

    def draw(self) -> dict[str, np.ndarray]:
        """Return prompt -> picture, uint8 [height, width, 3]."""
        return {prompt: picture for canvas in self.canvases for prompt, picture in self._draw(canvas).items()}

    def _draw(self, canvas: _Canvas) -> dict[str, np.ndarray]:
        """Return the pictures of one pack."""
        prompts, seed = canvas.prompts, self.config.train.seed
        size, width = self.rows * self.cols, self.config.model.latent_dim
        # Noise is keyed by prompt, not by step: the pictures of a run differ only by the weights.
        x_LZ = torch.cat([normal(seed64(seed, "sample image", prompt), size, width) for prompt in prompts])
        times = self._times()
        for now, then in pairwise(times):
            both = torch.cat([x_LZ, x_LZ]) if self.guided else x_LZ
            v_LZ = self._velocity(canvas.batch, SamplerLatents(both, now))
            if self.guided:
                with_text, without = v_LZ.chunk(2)
                v_LZ = extrapolated(without, with_text, self.config.telemetry.sample_guidance)
            x_LZ = euler_step(x_LZ, v_LZ, now, then)
        return {prompt: self._picture(tokens) for prompt, tokens in zip(prompts, x_LZ.split(size), strict=True)}

    def _times(self) -> list[float]:
        """Return the grid points from 1 to 0, shifted as in training (docs/bagel.md#sampler)."""
        shift = self.config.train.timestep_shift
        even = np.linspace(1, 0, self.config.telemetry.sample_steps + 1)
        return [float(shifted(t, shift)) for t in even]

    def _velocity(self, batch: PackedBatch, latents: SamplerLatents) -> torch.Tensor:
        """Return the velocity [L, Z] of all latent tokens, on every rank.

        The ranks of the last stage scatter their rows into zeros, and an all-reduce adds them up; of replicas, only one
        contributes.
        """
        outputs = self.evaluate(self.builder.build(batch, latents))
        grid = self.mesh
        found = torch.zeros(latents.x_t_LZ.shape, device=self.builder.device)
        if outputs is not None and grid.dp.first and (grid.tp.first or self.config.parallel.row_shards > 1):
            latent_g = batch.rows.to(self.builder.device).latent_g
            found[latent_g[latent_g >= 0]] = outputs.velocity_gZ.float()[latent_g >= 0]
        dist.all_reduce(found)
        return found.cpu()

    def _picture(self, tokens: torch.Tensor) -> np.ndarray:
        """Decode the latent tokens [X, Z] of one image into uint8 [height, width, 3]."""
        latent = unpatchify(tokens, self.rows, self.cols, self.config.model.latent_patch)
        pixels = self.codec.decode(latent[None].to(self.builder.device))[0]
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()

    def _canvases(self) -> list[_Canvas]:
        """Group the prompts into packs of at most `data.max_tokens` tokens. Raises UserError."""
        limit, used = self.config.data.max_tokens, 0
        canvases: list[_Canvas] = []
        group: list[str] = []
        for prompt in self.config.telemetry.prompts:
            cost = sum(item_tokens(item) for items in self._samples([prompt]) for item in items)
            if cost > limit:
                raise UserError(
                    f"telemetry.prompts: {prompt!r} needs {cost} tokens at telemetry.sample_size, data.max_tokens is "
                    f"{limit}: shorten it, sample smaller pictures or raise data.max_tokens"
                )
            if used + cost > limit:
                canvases.append(self._canvas(group))
                group, used = [], 0
            group.append(prompt)
            used += cost
        return [*canvases, self._canvas(group)] if group else canvases

    def _samples(self, prompts: Sequence[str]) -> list[list[Item]]:
        """Return the items of each prompt's sample, then of each sample without text if guided."""
        image = Latent(1, self.rows, self.cols, noised=True)
        texts: list[list[Item]] = [[Text(0, len(self.tokenizer.encode(prompt))), image] for prompt in prompts]
        return texts + [[image] for _ in prompts if self.guided]

    def _canvas(self, prompts: list[str]) -> _Canvas:
        """Pack the samples of some prompts and build their batch."""
        samples = [
            plan_sample(items, SampleKey(0, "prompts", number, 0), Dropout())
            for number, items in enumerate(self._samples(prompts))
        ]
        words = [
            word
            for number, sample in enumerate(samples)
            for word in self.writer.words(sample.items, lambda _, n=number: self.tokenizer.encode(prompts[n]))  # type: ignore[misc]
        ]
        pack = build_pack(samples)
        assert (pack.kind_S == LATENT).sum() == len(samples) * self.rows * self.cols
        batch = self.batches.build(self.batches.lay_out(pack), np.array(words, np.int64), patches=[], pixels=[])
        return _Canvas(batch, tuple(prompts))
