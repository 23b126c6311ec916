"""Language, length and sentences of texts by simple rules."""

import re
from collections import Counter

STOP_WORDS = {
    "en": "a an and are as at be by for from in is it of on or that the this to with you was not have",
    "de": "der die das und ist nicht ein eine den dem des zu mit auf für von im sich auch werden sie wird",
    "fr": "le la les et est pas un une des du en pour dans que qui sur avec au vous il ce",
    "es": "el la los las y es un una de del en para que por con se su al como más no",
    "it": "il lo la gli le e è un una di del della in per che con non si da come sono",
    "pt": "o os as e é um uma de do da em para que por com não se no na como mais",
    "nl": "de het een en is van in op te dat die niet met voor zijn aan door als om ook",
    "sv": "och att det som en ett är på av för med den till inte har de kan du om",
    "pl": "i w na z do się nie jest to że dla od po przez oraz lub jak ten",
    "cs": "a v na se je to že s z do pro jako o nebo které které při podle",
    "ru": "и в на не что с по это для как из к от или при если вы его",
    "id": "dan yang di untuk dengan dari pada ini itu tidak adalah dalam akan ke atau",
    "tr": "ve bir bu için ile da de olarak olan çok daha gibi ne var",
    "vi": "và của là các cho có được trong một không với này để người những",
}
"""Most common words by language."""
_WORDS = {name: frozenset(words.split()) for name, words in STOP_WORDS.items()}
_ALL_STOP_WORDS: frozenset[str] = frozenset().union(*_WORDS.values())
_SCRIPTS = (
    ("ja", re.compile("[぀-ヿ]")),
    ("ko", re.compile("[가-힯]")),
    ("zh", re.compile("[一-鿿]")),
    ("ar", re.compile("[؀-ۿ]")),
    ("he", re.compile("[֐-׿]")),
    ("hi", re.compile("[ऀ-ॿ]")),
    ("el", re.compile("[Ͱ-Ͽ]")),
    ("th", re.compile("[฀-๿]")),
)
"""Languages told by script, in order: Japanese has Chinese characters, too."""
SCRIPT_SHARE = 0.2
"""Least share of letters of a script."""


def language(text: str, least: float = 0.1) -> str:
    """Code of a text's language, "" if undecided.

    Args:
        text: some sentences.
        least: least share of the language's most common words among all words.
    """
    letters = sum(character.isalpha() for character in text)
    if not letters:
        return ""
    for name, script in _SCRIPTS:
        if len(script.findall(text)) >= SCRIPT_SHARE * letters:
            return name
    words = re.findall(r"[^\W\d_]+", text.lower())
    shares = {name: sum(word in common for word in words) / len(words) for name, common in _WORDS.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= least else ""


def count_tokens(text: str) -> int:
    """Tokens of a text, estimated without a tokenizer: words of up to six letters, their further parts, and signs."""
    return sum(-(-len(piece) // 6) if piece[0].isalnum() else 1 for piece in re.findall(r"\w+|[^\w\s]", text))


def first_tokens(text: str, most: int) -> str:
    """The longest start of a text within `most` tokens that ends with a sentence, else a clause, else a word."""
    if count_tokens(text) <= most:
        return text
    for ends in (r"[.!?。！？]+(?=\s|$)|\n\n", r"[,;:](?=\s)", r"(?=\s)"):
        kept = ""
        for found in re.finditer(ends, text):
            if count_tokens(text[: found.end()]) > most:
                break
            kept = text[: found.end()]
        if kept.strip():
            return kept.rstrip().rstrip(",;:")
    return ""


def content_words(text: str) -> list[str]:
    """The distinct words of a text that name something: no stop words of any language, three letters or more."""
    words = re.findall(r"[^\W\d_]{3,}", text.lower())
    return list(dict.fromkeys(word for word in words if word not in _ALL_STOP_WORDS))


def paragraphs(text: str) -> Counter[str]:
    """The paragraphs of a text, white space collapsed, with how often each occurs."""
    return Counter(" ".join(piece.split()) for piece in text.split("\n\n") if piece.strip())
