"""The word ids of a sample's TEXT tokens: contents and the special tokens around every text and image."""

from collections.abc import Callable, Iterable

from megabagel.data.tokenize.tokenizer import TextTokenizer
from megabagel.sequence.items import Clip, Item, Text


class Writer:
    """Writes samples as word ids (docs/bagel.md#samples, #special-tokens)."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.bos, self.eos = tokenizer.token_id("<|im_start|>"), tokenizer.token_id("<|im_end|>")
        self.image = [tokenizer.token_id("<|vision_start|>"), tokenizer.token_id("<|vision_end|>")]

    def words(self, items: Iterable[Item], ids: Callable[[int], list[int]]) -> list[int]:
        """bos, ids, eos per text; start- and end-of-image per image. `ids` gives the text of a slot."""
        words: list[int] = []
        for item in items:
            if isinstance(item, Text):
                content = ids(item.slot)
                assert len(content) == item.length, (item, len(content))
                words += [self.bos, *content, self.eos]
            else:
                words += self.image * (len(item.frames) if isinstance(item, Clip) else 1)
        return words
