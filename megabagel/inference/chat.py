"""A dialogue with a loaded model, whose contexts stay in the KV cache between turns."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from megabagel.inference import requests
from megabagel.inference.contexts import ImageContent
from megabagel.inference.decoding import TextSettings
from megabagel.inference.generated import Generated
from megabagel.inference.pictures import Picture
from megabagel.inference.presets import EDIT, adjusted, preset
from megabagel.inference.programs import Session, official_noise
from megabagel.sequence.keys import seed64
from megabagel.sequence.sample import LATENT

if TYPE_CHECKING:
    from megabagel.inference.api import Pipeline


class Chat:
    """A dialogue whose contexts stay in the cache: texts and images in, answers and pictures out.

    A generated picture enters the contexts as clean latents and ViT patches, so later turns see and edit it; a text
    answer enters as text. Close it, or use it in a `with`, to free its cache rows.
    """

    def __init__(self, model: "Pipeline", settings: TextSettings) -> None:
        self.model, self.settings = model, settings
        self.session: Session = model.engine.session()
        self.turn = 0

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the cache rows."""
        self.session.close()

    def show(self, *items: str | Picture) -> list[str | Image.Image]:
        """Add texts and images to the dialogue without asking for anything; returns them as read."""
        opened = [item if isinstance(item, str) else self.model.open(item) for item in items]
        shown, _ = self.model.items(opened, seed64(self.settings.seed, "turn", self.turn), both=True)
        requests.show(self.session, shown)
        self.turn += 1
        return opened

    def say(self, *items: str | Picture) -> str:
        """Add items and return the model's answer, which becomes part of the dialogue."""
        self.show(*items)
        settings = replace(self.settings, seed=seed64(self.settings.seed, "answer", self.turn))
        program = requests.answer(self.session, settings, self.model.engine.most_tokens)
        ids = self.model.engine.run(program, self.session, self._need(settings.max_new_tokens), ends_session=False)
        requests.show(self.session, [ids])
        return self.model.tokenizer.decode(ids)

    def draw(
        self, *items: str | Picture, size: tuple[int, int] | None = None, seed: int = 0, **options: Any
    ) -> Generated:
        """Add items and return a picture, which becomes part of the dialogue; options as in `Pipeline.generate`."""
        model = self.model
        opened = self.show(*items)
        chosen = preset(options.pop("preset", None) or EDIT)
        settings = adjusted(chosen.draw, **options)
        last = [
            op.content
            for op in self.session.log.ops
            if isinstance(op.content, ImageContent) and op.content.kind == LATENT
        ]
        rows, cols = model.grid(size, (last[-1].rows, last[-1].cols) if last else None)
        noise = official_noise(seed, rows * cols, model.config.model.latent_dim)
        program = requests.draw(self.session, (rows, cols), [noise], settings, chosen, None, model.engine.most_tokens)
        drawn = model.engine.run(program, self.session, self._need(3 * (rows * cols + 2)), ends_session=False)
        about = model.about(opened, settings, rows, cols)
        picture = Generated(model.pixels(drawn.tokens[0], rows, cols), {**about, "seed": seed})
        self.show(picture.image)
        return picture

    def _need(self, more: int) -> int:
        """Cache rows that a turn takes beside those that the session has."""
        log = self.session.log
        return sum(log.ops[number].content.tokens for number in range(len(log.ops)) if log.slots[number] is None) + more
