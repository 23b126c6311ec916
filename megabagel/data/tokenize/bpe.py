"""Training of a byte-level BPE tokenizer on a given corpus. Byte-level, so that every text can be encoded."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megabagel.sequence.items import SPECIAL_TOKENS


def train_bpe(texts: Iterable[str], vocabulary: int) -> str:
    """Train a tokenizer.

    Args:
        texts: the corpus.
        vocabulary: largest number of token ids, including the special tokens, which have ids 0 to 3.

    Returns:
        Content of a `tokenizer.json`.
    """
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        # All 256 bytes, also those that the corpus lacks; without them other texts could not be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str(pretty=True)
