"""Token ids of a sample: the texts, and the special tokens around every text and image."""

from collections.abc import Callable, Iterable

from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.sequence.items import Clip, Item, Text


class Writer:
    """Writes the text tokens of samples as token ids (docs/bagel.md#samples, docs/bagel.md#special-tokens)."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.bos, self.eos = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        self.image = [tokenizer.token_id("<|vision_start|>"), tokenizer.token_id("<|vision_end|>")]

    def words(self, items: Iterable[Item], ids: Callable[[int], list[int]]) -> list[int]:
        """Token ids of a sample: bos, ids, eos per text; start and end of image per image.

        Tokens of images have no ids and are not included. `ids` returns the token ids of the text in a slot.
        """
        words: list[int] = []
        for item in items:
            if isinstance(item, Text):
                content = ids(item.slot)
                assert len(content) == item.length, (item, len(content))
                words += [self.bos, *content, self.eos]
            else:
                words += self.image * (len(item.frames) if isinstance(item, Clip) else 1)
        return words
