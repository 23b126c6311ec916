"""Expansion of a document into sequence items: the token sets of every image (BAGEL section 2.3).

A generated image enters as noised latents. If anything follows it, its clean latents and ViT tokens are inserted right
after, so that later items are conditioned on the clean image (docs/bagel.md#tasks).
"""

from dataclasses import dataclass, replace

from megabagel.config.schema import Config, DataConfig, ModelConfig
from megabagel.data.decode.transforms import resize_target
from megabagel.data.documents import Document, ImageItem, TextItem
from megabagel.data.plan.augmentation import Shown, shown_items
from megabagel.sequence.items import Clip, Item, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey


@dataclass(frozen=True)
class Expander:
    """Computes token sets and token grid sizes for documents, with the resize rules and patch sizes of one run."""

    data: DataConfig
    model: ModelConfig

    @classmethod
    def of(cls, config: Config) -> "Expander":
        """The expander for a config."""
        return cls(config.data, config.model)

    def items(self, document: Document, task: str, key: SampleKey) -> list[Item]:
        """Sequence items of one visit (one use of a sample in one epoch).

        Args:
            document: its roles are assigned.
            task: task of the source.
            key: identity of the visit; keys all random choices.

        Returns:
            Items in sequence order; their slots are indices into `document.items`.
        """
        shown = shown_items(document, key)
        if task == "video":
            return self._video(shown, key)
        if task == "reward":
            return self._rewarded(shown)
        # Conditioning dropout serves classifier-free guidance, so texts are droppable only if an image is generated.
        generates = any(item.role == "target" for _, item in shown if isinstance(item, ImageItem))
        looks = sum(item.role == "look" for _, item in shown) or 1
        last = shown[-1][0]
        result: list[Item] = []
        for slot, item in shown:
            if isinstance(item, TextItem):
                loss = item.role == "target"
                result.append(Text(slot, item.n_ids, loss, droppable=generates and not loss))
            elif item.role == "look":
                result.append(self._vit(slot, item, looks))
            else:
                if item.role == "target":
                    result.append(self._latent(slot, item, noised=True))
                if item.role == "condition" or slot != last:
                    result += [self._latent(slot, item, noised=False), self._vit(slot, item, droppable=True)]
        return result

    def _rewarded(self, shown: Shown) -> list[Item]:
        """Items of a judged picture: prompt and noised picture as for t2i; scores and second target have no tokens."""
        constraint = next((slot for slot, item in shown if item.role == "constraint"), None)
        result: list[Item] = []
        for slot, item in shown:
            if isinstance(item, TextItem) and item.role == "condition":
                result.append(Text(slot, item.n_ids, droppable=True))
            elif isinstance(item, ImageItem) and item.role == "target":
                result.append(replace(self._latent(slot, item, noised=True), constraint_slot=constraint))
        return result

    def _video(self, shown: Shown, key: SampleKey) -> list[Item]:
        """Items of a video: texts, then the frames in random groups of consecutive frames (diffusion forcing).

        Each group has one noise level and full attention inside, and attends to the noised groups before it
        (docs/bagel.md#samples).
        """
        result: list[Item] = []
        frames: list[Latent] = []
        for slot, item in shown:
            if isinstance(item, TextItem):
                result.append(Text(slot, item.n_ids, droppable=True))
            else:
                frames.append(self._latent(slot, item, noised=True))
        draws = key.generator("groups")
        while frames:
            size = int(draws.integers(1, len(frames) + 1))
            result.append(Clip(tuple(frames[:size]), steps=(1,) * size, chain=0))
            frames = frames[size:]
        return result

    def _latent(self, slot: int, item: ImageItem, noised: bool) -> Latent:
        height, width = self.vae_size(item)
        stride = self.model.latent_stride
        return Latent(slot, height // stride, width // stride, noised, droppable=not noised)

    def _vit(self, slot: int, item: ImageItem, images: int = 1, droppable: bool = False) -> Vit:
        patch = self.model.vit.patch
        width, height = resize_target(item.width, item.height, self.data.vit_resize, patch, images)
        return Vit(slot, height // patch, width // patch, droppable)

    def vae_size(self, item: ImageItem) -> tuple[int, int]:
        """Height and width in pixels to which an image is resized for the VAE."""
        width, height = resize_target(item.width, item.height, self.data.vae_resize, self.model.latent_stride)
        return height, width
