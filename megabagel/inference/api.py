"""Python API of inference: `load_pretrained` returns a `Pipeline` with `generate`, `edit`, `ask` and `chat`.

model = megabagel.load_pretrained("runs/demo")
(picture,) = model.generate("a red circle on the left", size=(64, 64), seed=3)
picture.save("circle.png")
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megabagel.data.decode.contract import DecodeError
from megabagel.data.decode.headers import damage_is_named, open_image
from megabagel.data.decode.transforms import to_rgb
from megabagel.data.tokenize.tokenizer import TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.inference import requests
from megabagel.inference.build import build_runner
from megabagel.inference.chat import Chat
from megabagel.inference.contexts import ImageContent
from megabagel.inference.decoding import TextSettings
from megabagel.inference.engine import Done, Engine, Request
from megabagel.inference.generated import Generated, image_digest, read_metadata
from megabagel.inference.load import Source, open_source
from megabagel.inference.pictures import Picture, from_latent, latent_tokens, patches_of, resized, to_pixels
from megabagel.inference.presets import DRAW, EDIT, adjusted, preset
from megabagel.inference.programs import DrawSettings, Event, Special, Step, Token, official_noise
from megabagel.inference.prompts import THINK_BEFORE_ANSWER, THINK_BEFORE_IMAGE
from megabagel.inference.runner import Runner
from megabagel.model.vae import Codec, build_codec
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.runtime import cpu_backend
from megabagel.runtime.device import current_device
from megabagel.sequence.keys import seed64
from megabagel.sequence.sample import LATENT, VIT


class Pipeline:
    """A model on this rank with its tokenizer, autoencoder and engine.

    On a grid every rank must make the same calls in the same order, since each forward pass is collective.

    Args:
        source: model on disk, from `open_source`.
        mesh: grid of the running job; None: this device alone.
        cache_tokens: rows of the KV cache, shared by all requests.
        seats: most tokens of one forward pass.
        runner: over weights that are there already, as in training; None: a new one, filled from `source`.
        codec: image autoencoder; None: built from the config on first use.
    """

    def __init__(
        self,
        source: Source,
        mesh: Mesh | None = None,
        cache_tokens: int = 32768,
        seats: int = 8192,
        runner: Runner | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.source, self.config = source, source.config
        self.tokenizer: TextTokenizer = load_tokenizer(self.config.data.tokenizer)
        if self.tokenizer.vocab_size > self.config.model.vocab:
            raise UserError(
                f"data.tokenizer={self.config.data.tokenizer} has {self.tokenizer.vocab_size} tokens, the model "
                f"{self.config.model.vocab}: name the tokenizer that belongs to the weights (data.tokenizer=FILE)"
            )
        names = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
        special = Special(*(self.tokenizer.token_id(name) for name in names))
        if runner is None:
            runner = build_runner(self.config, mesh, choose_attention(self.config), source.fill, cache_tokens)
        self.engine = Engine(runner, special, most_tokens=seats)
        self._codec = codec

    @property
    def codec(self) -> Codec:
        """Image autoencoder, built on first use: answering questions does not need it."""
        if self._codec is None:
            self._codec = build_codec(self.config.model.vae, current_device())
        return self._codec

    def generate(
        self, prompt: str, n: int = 1, size: tuple[int, int] | None = None, seed: int = 0, **options: Any
    ) -> list[Generated]:
        """Generate pictures from a prompt.

        Args:
            prompt: what to draw.
            n: number of pictures; they start from seeds `seed`, `seed` + 1, ...
            size: width and height in pixels; default: the largest square that was trained (at most 1024).
            seed: of the first picture.
            options: preset, think, thought_tokens (most, instead of the preset's), points, shift, text_scale,
                image_scale, interval, renorm, renorm_min, taylorseer.

        Raises:
            UserError: a setting makes no sense, or the request cannot fit.
        """
        return self._pictures(self.submit_draw([prompt], n, size, seed, **options))

    def edit(
        self,
        images: Sequence[Picture],
        instruction: str,
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> list[Generated]:
        """Generate pictures from one or several images and an instruction.

        Args:
            images: files, their bytes or images in memory, in the order in which the model gets them.
            instruction: the edit, as text.
            n: number of pictures; they start from seeds `seed`, `seed` + 1, ...
            size: width and height in pixels; default: the size of the last image after resizing.
            seed: of the first picture.
            options: as in `generate`.

        Raises:
            UserError: as in `generate`, or an image cannot be read.
        """
        options = {"preset": EDIT, **options}
        return self._pictures(self.submit_draw([*map(self.open, images), instruction], n, size, seed, **options))

    def ask(self, images: Sequence[Picture], question: str, think: bool = False, **options: Any) -> str:
        """Answer a question about images, or a text question if there are none.

        Args:
            images: in the order in which they are shown.
            question: text.
            think: let the model reason first; its reasoning is part of the answer, between <think> tags.
            options: fields of `TextSettings`: max_new_tokens, temperature, top_p, seed.
        """
        request = self.submit_answer([*map(self.open, images), question], think, **options)
        done = self._finish(request)
        return self.tokenizer.decode(done.result)

    def chat(self, **options: Any) -> Chat:
        """A dialogue of texts and images, in and out; `options` as in `ask`."""
        return Chat(self, TextSettings(**options))

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield the events of a submitted request as they happen, `Done` last; other queued requests run beside it."""
        while request.done is None:
            for owner, event in self.engine.step():
                if owner is request:
                    yield event

    def submit_draw(
        self,
        items: Sequence[str | Image.Image],
        n: int = 1,
        size: tuple[int, int] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Request:
        """Queue the generation of pictures; `Done.result` is a list of `Generated`.

        Args:
            items: texts and RGB images, in order.
            n: number of pictures.
            size: width and height in pixels, as in `generate`.
            seed: of the first picture.
            options: as in `generate`.
        """
        session = self.engine.session()
        name = options.pop("preset", None) or DRAW
        chosen = preset(name)
        think, thought_tokens = bool(options.pop("think", False)), options.pop("thought_tokens", None)
        shown, fitted = self.items(items, seed, both=True)
        rows, cols = self.grid(size, fitted)
        settings = adjusted(chosen.draw, **options)
        thought = None
        if think:
            most_thought = thought_tokens or chosen.thought.max_new_tokens
            thought = replace(chosen.thought, seed=seed, max_new_tokens=most_thought)
        system = self._ids(THINK_BEFORE_IMAGE) if think else None
        requests.show(session, shown, system)
        most = 2 * (
            requests.tokens_of(shown) + len(system or ()) + 2 + 2 * (thought.max_new_tokens + 2 if thought else 0)
        )
        need = most + 3 * n * (rows * cols + 2)
        noises = [official_noise(seed + i, rows * cols, self.config.model.latent_dim) for i in range(n)]
        program = requests.draw(session, (rows, cols), noises, settings, chosen, thought, self.engine.most_tokens)
        about = self.about(items, settings, rows, cols) | {"think": think, "preset": name}
        if thought is not None:
            about["thought_tokens"] = thought.max_new_tokens
        return self.engine.submit(_finished(program, lambda drawn: self._decoded(drawn, about, seed)), session, need)

    def submit_answer(self, items: Sequence[str | Image.Image], think: bool = False, **options: Any) -> Request:
        """Queue an answer; `Done.result` are its ids. Arguments as `ask`."""
        session, settings = self.engine.session(), TextSettings(**options)
        shown, _ = self.items(items, settings.seed, both=False)
        system = self._ids(THINK_BEFORE_ANSWER) if think else None
        requests.show(session, shown, system)
        need = requests.tokens_of(shown) + len(system or ()) + 2 + settings.max_new_tokens
        return self.engine.submit(requests.answer(session, settings, self.engine.most_tokens), session, need)

    @staticmethod
    def open(picture: Picture) -> Image.Image:
        """Open a picture as RGB. Raises UserError if it cannot be read."""
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        name = "the image" if isinstance(picture, bytes) else str(picture)
        try:
            blob = picture if isinstance(picture, bytes) else Path(picture).read_bytes()
            image = open_image(blob)
            with damage_is_named():
                return to_rgb(image)
        except OSError as error:
            raise UserError(f"{name}: cannot be read ({error.strerror}); expected an image file") from error
        except DecodeError as error:
            raise UserError(f"{name}: {error}; expected a readable PNG, JPEG or other image (docs/data.md)") from error

    def views(self, image: Image.Image, seed: int, number: int, both: bool) -> tuple[ImageContent, ...]:
        """Contents of an image for the model: ViT patches, preceded by clean latents for generation and editing.

        Args:
            image: RGB.
            seed: of the autoencoder's posterior sample.
            number: index of the image in the request, part of the key of that sample.
            both: whether to add clean latents.
        """
        model, data = self.config.model, self.config.data
        found = []
        if model.visual_gen:
            image = resized(image, data.vae_resize, model.latent_stride)
        if both and model.visual_gen:
            keyed = [seed64(seed, "posterior", number)]
            latent = self.codec.encode(to_pixels(image)[None].to(current_device()), keyed)[0].cpu()
            rows, cols = image.height // model.latent_stride, image.width // model.latent_stride
            found.append(ImageContent(LATENT, rows, cols, latent_tokens(latent, model.latent_patch)))
        if model.visual_und:
            small = resized(image, data.vit_resize, model.vit.patch)
            rows, cols = small.height // model.vit.patch, small.width // model.vit.patch
            found.append(ImageContent(VIT, rows, cols, patches_of(small, model.vit.patch)))
        return tuple(found)

    def items(
        self, items: Sequence[str | Image.Image], seed: int, both: bool
    ) -> tuple[list[requests.Item], tuple[int, int] | None]:
        """Contents of texts and images, and the latent grid of the last image."""
        shown: list[requests.Item] = []
        size = None
        for number, item in enumerate(items):
            if isinstance(item, str):
                shown.append(self._ids(item))
                continue
            views = self.views(item, seed, number, both)
            if not views:
                raise UserError("the model has neither a ViT nor a latent path, so it cannot be shown images")
            shown.append(views)
            size = (views[0].rows, views[0].cols) if views[0].kind == LATENT else size
        return shown, size

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def grid(self, size: tuple[int, int] | None, fitted: tuple[int, int] | None) -> tuple[int, int]:
        """Rows and columns of latent tokens. Raises UserError for a size that the model cannot draw."""
        model = self.config.model
        if not model.visual_gen:
            raise UserError("model.visual_gen is false: the model generates no images; ask it instead")
        stride, side = model.latent_stride, model.latent_grid
        if size is None:
            square = min(1024, self.config.data.vae_resize.max_size) // stride
            return fitted or (min(square, side), min(square, side))
        width, height = size
        if min(size) < stride or width % stride or height % stride:
            near = "x".join(str(max(stride, round(x / stride) * stride)) for x in size)
            raise UserError(f"size {width}x{height}: expected multiples of {stride} pixels, such as {near}")
        if max(width, height) > side * stride and not model.interpolate_pos:
            raise UserError(f"size {width}x{height}: the model's latent grid ends at {side * stride} pixels per side")
        return height // stride, width // stride

    def about(self, items: Sequence[str | Image.Image], settings: DrawSettings, rows: int, cols: int) -> dict[str, Any]:
        """Metadata of a request, stored in its PNGs.

        Args:
            items: texts and images of the request; images are recorded by digest.
            settings: of the sampler.
            rows: rows of latent tokens.
            cols: columns of latent tokens.
        """
        stride = self.config.model.latent_stride
        return {
            "items": [item if isinstance(item, str) else {"sha256": image_digest(item)} for item in items],
            "width": cols * stride,
            "height": rows * stride,
            "settings": asdict(settings),
            "evaluations": settings.points - 1,
            "weights": self.source.weights,
            "digest": self.source.digest,
            "precision": self.config.train.precision,
        }

    def _decoded(self, drawn: requests.Drawn, about: dict[str, Any], seed: int) -> list[Generated]:
        thought = None if drawn.thought is None else self.tokenizer.decode(drawn.thought)
        return [
            Generated(self.pixels(tokens, drawn.rows, drawn.cols), {**about, "seed": seed + i, "thought": thought})
            for i, tokens in enumerate(drawn.tokens)
        ]

    def pixels(self, tokens: Tensor, rows: int, cols: int) -> np.ndarray:
        """uint8 [height, width, 3] of latent tokens."""
        return from_latent(tokens, rows, cols, self.config.model.latent_patch, self.codec, current_device())

    def _finish(self, request: Request) -> Done:
        for _ in self.stream(request):
            pass
        done = request.done
        assert done is not None
        if done.error is not None:
            raise UserError(done.error)
        return done

    def _pictures(self, request: Request) -> list[Generated]:
        return list(self._finish(request).result)


def _finished(program: Any, finish: Any) -> Any:
    """The program with its result handed to `finish`."""
    return finish((yield from program))


def load_pretrained(
    path: str | Path,
    weights: str | None = None,
    overrides: Sequence[str] = (),
    mesh: Mesh | None = None,
    cache_tokens: int = 32768,
) -> Pipeline:
    """Load a model from a run folder, a checkpoint of any grid, or a published folder.

    Args:
        path: the folder.
        weights: `ema` or `trained`; default: averaged weights where there are any.
        overrides: `section.key=value`, such as train.precision=bf16.
        mesh: the grid of the running job; None: this device alone.
        cache_tokens: rows of the KV cache, shared by all requests.

    Raises:
        UserError: there is no model, or it does not fit.
    """
    cpu_backend.install()
    return Pipeline(open_source(Path(path), weights, tuple(overrides)), mesh, cache_tokens)


__all__ = [
    "Chat",
    "Done",
    "Event",
    "Generated",
    "Pipeline",
    "Step",
    "Token",
    "image_digest",
    "load_pretrained",
    "read_metadata",
]
