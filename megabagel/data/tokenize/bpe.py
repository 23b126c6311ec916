"""A tokenizer for a corpus of one's own: byte-level BPE, so that every text has ids."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megabagel.sequence.items import SPECIAL_TOKENS


def train_bpe(texts: Iterable[str], vocabulary: int) -> str:
    """`tokenizer.json` with at most `vocabulary` ids; the special tokens have ids 0 to 3."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return model.to_str(pretty=True)
