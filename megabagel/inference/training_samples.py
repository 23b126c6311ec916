"""Sample images and answers of a training run: the inference engine over the weights that train.

The model of inference is assembled from the parameters of training themselves, so nothing is copied and no memory but
that of a KV cache is taken, which exists while samples are made. `train` does not import this room: the command hands
`training_sampler` in.
"""

import base64
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megabagel.config.schema import Config, SampleRequest
from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.errors import UserError
from megabagel.inference.api import Pipeline
from megabagel.inference.build import build_cache
from megabagel.inference.engine import Request
from megabagel.inference.load import Source
from megabagel.inference.pictures import resized
from megabagel.inference.runner import Ranks, Runner
from megabagel.model.bagel import Bagel
from megabagel.model.factory import LayerFactory
from megabagel.model.inputs import Hidden, StageInputs
from megabagel.model.kernels import Kernels
from megabagel.parallel.inputs import InputBuilder
from megabagel.parallel.linears import MegatronLayers
from megabagel.parallel.megatron import megatron_config
from megabagel.parallel.mesh import Axis, Mesh
from megabagel.runtime.device import current_device
from megabagel.runtime.objects import gathered
from megabagel.sequence.keys import seed64

logger = logging.getLogger(__name__)

ANSWER_TOKENS = 48
"""Longest answer to a sample question."""
CACHE_TOKENS = 16384
"""Rows of the KV cache at most, unless one sample alone needs more: samples that do not fit wait for others."""


@dataclass(frozen=True)
class _Sample:
    """One sample: its caption and how to submit it."""

    caption: str
    tokens: int
    """Tokens of its conditions and of its picture, estimated from above."""
    submit: Callable[[Pipeline], Request]
    asked: Image.Image | None = None
    """Image of a question, which is shown with the answer; None for a sample that is a picture itself."""


def training_sampler(
    config: Config, mesh: Mesh, chunks: Sequence[Bagel], tokenizer: TextTokenizer, builder: InputBuilder
) -> "TrainingSampler":
    """Return the sampler of a training run (a `train.sample_images.SamplerFactory`).

    Args:
        config: the run; `telemetry` lists prompts, edits and questions.
        mesh: grid of the run.
        chunks: this rank's model chunks, several with interleaved pipeline stages.
        tokenizer: of the run.
        builder: of training's inputs; its image autoencoder, kernels and attention engine are used.

    Raises:
        UserError: an image of `telemetry.edits` or `telemetry.questions` cannot be read.
    """
    return TrainingSampler(config, mesh, chunks, tokenizer, builder)


class TrainingSampler:
    """Makes the samples that `telemetry` lists, with the weights as they are at the moment.

    Samples are dealt over data-parallel replicas. Collective: all ranks call `draw`.
    """

    def __init__(
        self, config: Config, mesh: Mesh, chunks: Sequence[Bagel], tokenizer: TextTokenizer, builder: InputBuilder
    ) -> None:
        self.config, self.mesh, self.tokenizer, self.builder = config, mesh, tokenizer, builder
        parallel = replace(config.parallel, sp=False)
        self.twins = [_twin(replace(config, parallel=parallel), mesh, chunk, builder.kernels) for chunk in chunks]
        self.samples = self._samples()

    def draw(self) -> dict[str, np.ndarray]:
        """Return caption -> picture, uint8 [height, width, 3], in the order of the config; on rank 0, elsewhere {}."""
        mine = self.samples[self.mesh.dp.rank :: self.mesh.dp.size]
        # Every rank of a replica computes the same samples; its first rank reports them.
        found = self._run(mine)
        leads = self.mesh.tp.first and self.mesh.pp.first and self.mesh.cp.first
        encoded = {caption: _encoded(picture) for caption, picture in found.items()} if leads else {}
        replicas = [part for part in gathered(list(encoded.items())) if part]
        # Replica r has samples r, r + size, ...: in turn they give the order of the config.
        turns = max(map(len, replicas), default=0)
        return {part[i][0]: _decoded(part[i][1]) for i in range(turns) for part in replicas if i < len(part)}

    def _run(self, samples: Sequence[_Sample]) -> dict[str, np.ndarray]:
        """Return caption -> picture of some samples, on every rank of this replica."""
        if not samples:
            return {}
        needs = [6 * sample.tokens for sample in samples]
        model = self._pipeline(max(max(needs), min(sum(needs), CACHE_TOKENS)))
        requests = [(sample, sample.submit(model)) for sample in samples]
        while not model.engine.idle:
            model.engine.step()
        return dict(self._shown(model, sample, request) for sample, request in requests)

    def _shown(self, model: Pipeline, sample: _Sample, request: Request) -> tuple[str, np.ndarray]:
        """Caption and picture of a finished sample; a question's picture is the one that was asked about."""
        done = request.done
        assert done is not None
        if done.error is not None:
            raise UserError(f"telemetry: the sample {sample.caption!r} failed: {done.error}")
        if sample.asked is None:
            return sample.caption, done.result[0].pixels
        answer = model.tokenizer.decode(done.result)
        logger.info("sample answer: %s -> %s", sample.caption, answer)
        return f"{sample.caption} -> {answer}", np.asarray(sample.asked)

    def _pipeline(self, cache_tokens: int) -> Pipeline:
        """Return the model for inference with a KV cache of its own."""
        source = Source(Path(self.config.run.dir), self.config, lambda stage: None, "training", "")
        numbers = [int(number) for twin in self.twins for number in twin.layers]
        cache = build_cache(self.config, self.mesh.tp.size, numbers, cache_tokens)
        stage = self.twins[0] if len(self.twins) == 1 else cast(Bagel, _Interleaved(self.twins, self.mesh.pp))
        ranks = Ranks(self.mesh.cp, self.mesh.pp)
        runner = Runner(self.config.model, stage, cache, self.builder.attention, current_device(), ranks)
        return Pipeline(source, self.mesh, runner=runner, codec=self.builder.codec)

    def _samples(self) -> list[_Sample]:
        telemetry = self.config.telemetry
        drawn = [self._drawn(prompt, [prompt], prompt) for prompt in telemetry.prompts]
        edited = [
            self._drawn(f"{edit.text} ({Path(edit.image).name})", [_opened(edit, "edits"), edit.text], edit.text)
            for edit in telemetry.edits
        ]
        return [*drawn, *edited, *map(self._asked, telemetry.questions)]

    def _drawn(self, caption: str, items: Sequence[str | Image.Image], text: str) -> _Sample:
        """A picture from a text, or from an image and an instruction."""
        telemetry, model = self.config.telemetry, self.config.model
        height, width = telemetry.sample_size
        size = (width, height) if len(items) == 1 else None
        # Keyed by the text, not by the step: pictures of a run differ only by the weights.
        seed = seed64(self.config.train.seed, "sample image", text) >> 1

        def submit(model: Pipeline) -> Request:
            return model.submit_draw(
                items,
                size=size,
                seed=seed,
                points=telemetry.sample_steps + 1,
                shift=self.config.train.timestep_shift,
                text_scale=telemetry.sample_guidance,
                image_scale=1.0,
                interval=(0.0, 1.0),
                renorm_min=1.0,
            )

        tokens = (height // model.latent_stride) * (width // model.latent_stride)
        return _Sample(caption, self._tokens(text, len(items) - 1) + tokens, submit)

    def _asked(self, question: SampleRequest) -> _Sample:
        image = _opened(question, "questions")

        def submit(model: Pipeline) -> Request:
            return model.submit_answer([image, question.text], max_new_tokens=ANSWER_TOKENS)

        shown = resized(image, self.config.data.vit_resize, self.config.model.vit.patch)
        caption = f"{question.text} ({Path(question.image).name})"
        return _Sample(caption, self._tokens(question.text, 1) + ANSWER_TOKENS, submit, shown)

    def _tokens(self, text: str, images: int) -> int:
        """Tokens of a text and of images as large as the config allows, with delimiters."""
        model, data = self.config.model, self.config.data
        views = [(data.vae_resize.max_size, model.latent_stride), (data.vit_resize.max_size, model.vit.patch)]
        image = sum((size // stride + 1) ** 2 + 2 for size, stride in views)
        # An edited picture is as large as its image.
        return len(self.tokenizer.encode(text)) + 16 + 2 * images * image


class _Interleaved(torch.nn.Module):
    """The chunks of a rank under an interleaved schedule as one stage: what `Runner` uses of a `Bagel`, no more.

    Exchanges between the chunks happen inside.
    """

    def __init__(self, chunks: Sequence[Bagel], pp: Axis) -> None:
        super().__init__()
        self.chunks, self.pp = torch.nn.ModuleList(chunks), pp
        self.first, self.last = chunks[0].first, chunks[-1].last
        self.heads = chunks[-1].heads if self.last else None

    def through_layers(self, inputs: StageInputs, hidden: Hidden | None) -> Hidden:
        """Run this rank's chunks in order, the ring of stages between two of them."""
        for number, chunk in enumerate(self.chunks):
            if number:
                hidden = self._around(hidden)
            hidden = cast(Bagel, chunk).through_layers(inputs, hidden)
        assert hidden is not None
        return hidden

    def _around(self, hidden: Hidden | None) -> Hidden:
        """Send the hidden states to the next stage of the ring and receive those of this rank's next chunk."""
        assert hidden is not None
        ahead, behind = ((self.pp.rank + step) % self.pp.size for step in (1, -1))
        sent = torch.cat([hidden.und_uD, hidden.gen_gD])
        got = torch.empty_like(sent)
        # Blocking calls in order around the ring would do as well; posted together they cannot wait for each other.
        pending = dist.isend(sent, dist.get_global_rank(self.pp.group, ahead), group=self.pp.group)
        dist.recv(got, dist.get_global_rank(self.pp.group, behind), group=self.pp.group)
        if pending is not None:
            pending.wait()
        und, gen = got.split([len(hidden.und_uD), len(hidden.gen_gD)])
        return Hidden(und, gen, gen[:, :0], gen[:, 0])


def _twin(config: Config, mesh: Mesh, chunk: Bagel, kernels: Kernels) -> Bagel:
    """Return a chunk that holds the very parameters of `chunk` and keeps rows whole between its linears."""
    # Sequence parallelism, which training uses, deals rows over tensor-parallel ranks by counts that a decoded token
    # cannot have. Built without storage: `use_cpu_initialization` keeps megatron-core from naming a device.
    megatron = replace(megatron_config(config), use_cpu_initialization=True)
    factory: LayerFactory = MegatronLayers(megatron, mesh, kernels)
    numbers = [int(number) for number in chunk.layers]
    layers = range(numbers[0], numbers[-1] + 1) if numbers else range(0)
    with torch.device("meta"):
        twin = Bagel(config.model, factory, layers, first=chunk.first, last=chunk.last)
    own = dict(twin.named_modules())
    for name, module in chunk.named_modules():
        # Privates of torch's Module: sharing a Parameter object has no public name; assigning attributes one by one
        # would miss buffers.
        own[name]._parameters.update(module._parameters)
        own[name]._buffers.update(module._buffers)
    return twin.eval()


def _opened(request: SampleRequest, key: str) -> Image.Image:
    """Return the image of a request. Raises UserError that names the key."""
    try:
        return Pipeline.open(Path(request.image))
    except UserError as error:
        raise UserError(f"telemetry.{key}: {error}") from error


def _encoded(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _decoded(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
