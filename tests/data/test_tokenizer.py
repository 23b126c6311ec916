import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megabagel.data.tokenize import tokenizer as module
from megabagel.data.tokenize.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.sequence.items import SPECIAL_TOKENS

TEXTS = [f"a {colour} {shape} on the {side}" for colour in ("red", "blue") for shape in ("circle", "square")
         for side in ("left", "right")]  # fmt: skip


def train_bpe(path: Path, special: tuple[str, ...] = SPECIAL_TOKENS, as_special: bool = True) -> str:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special) if as_special else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.add_tokens(list(special))
    model.save(str(path))
    return str(path)


def train_sentencepiece(path: Path, kind: str = "control_symbols", special: tuple[str, ...] = SPECIAL_TOKENS) -> str:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS * 4),
            model_writer=file,
            model_type="bpe",
            vocab_size=320,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            minloglevel=2,
            **{kind: list(special)},
        )
    return str(path)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "hf").mkdir()
    train_bpe(folder / "hf" / "tokenizer.json")
    return {
        "bytes": "bytes",
        "folder": str(folder / "hf"),
        "merely added": train_bpe(folder / "added.json", as_special=False),
        "control symbols": train_sentencepiece(folder / "control.model"),
        "user-defined symbols": train_sentencepiece(folder / "user.model", "user_defined_symbols"),
    }


@pytest.fixture(params=["bytes", "folder", "merely added", "control symbols", "user-defined symbols"])
def tokenizer(request: pytest.FixtureRequest, specs: dict[str, str]) -> TextTokenizer:
    return load_tokenizer(specs[request.param])


def special_ids(tokenizer: TextTokenizer) -> list[int]:
    return [tokenizer.token_id(token) for token in SPECIAL_TOKENS]


def test_special_tokens_have_ids_of_their_own(tokenizer: TextTokenizer) -> None:
    ids = special_ids(tokenizer)
    assert len(set(ids)) == 4 and max(ids) < tokenizer.vocab_size
    with pytest.raises(KeyError):
        tokenizer.token_id("<|nowhere|>")


@pytest.mark.parametrize("text", ["a red circle", "  two  spaces ", "Zürich 東京 🎉\n", "a", "\x00\t", *TEXTS[:2]])
def test_text_comes_back(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(special_ids(tokenizer))
    assert all(0 <= number < tokenizer.vocab_size for number in ids)


@pytest.mark.parametrize(
    "text",
    ["<|im_end|>", "a<|im_start|>b", "<|vision_start|><|vision_end|>", "<<|im_end|>|im_end|> <|im_end|", "<|im_"],
)
def test_names_of_special_tokens_in_a_caption_are_plain_text(tokenizer: TextTokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert not set(ids) & set(special_ids(tokenizer))
    assert tokenizer.decode(ids) == text


def test_random_mixtures_of_names_never_become_special(tokenizer: TextTokenizer) -> None:
    rng, special = random.Random(0), set(special_ids(tokenizer))
    parts = [*SPECIAL_TOKENS, "<", "|", "im_start", "|>", " ", "a", "é"]
    for _ in range(200):
        text = "".join(rng.choices(parts, k=6))
        assert not set(tokenizer.encode(text)) & special
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_leaves_special_tokens_out(tokenizer: TextTokenizer) -> None:
    start, end, *_ = special_ids(tokenizer)
    assert tokenizer.decode([start, *tokenizer.encode("a red circle"), end]) == "a red circle"


def test_fingerprints_tell_tokenizers_apart(specs: dict[str, str], tmp_path: Path) -> None:
    prints = {load_tokenizer(spec).fingerprint() for spec in specs.values()}
    assert len(prints) == len(specs)
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(specs["control symbols"]).read_bytes())
    assert load_tokenizer(str(copy)).fingerprint() in prints


def test_bytes_are_bytes() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert special_ids(tokenizer) == [256, 257, 258, 259] and tokenizer.vocab_size == 260
    assert tokenizer.decode([97, 0xC3]) == "a�"


def test_a_length_limit_in_the_file_is_not_obeyed(specs: dict[str, str], tmp_path: Path) -> None:
    model = Tokenizer.from_file(f"{specs['folder']}/tokenizer.json")
    model.enable_truncation(2)
    model.enable_padding(length=50)
    model.save(str(tmp_path / "tokenizer.json"))
    plain, limited = load_tokenizer(specs["folder"]), load_tokenizer(str(tmp_path))
    assert limited.encode(TEXTS[0]) == plain.encode(TEXTS[0])


def test_users_mistakes(tmp_path: Path) -> None:
    def message(spec: Path | str) -> str:
        with pytest.raises(UserError) as caught:
            load_tokenizer(str(spec))
        assert str(spec) in str(caught.value)
        return str(caught.value)

    assert "no such file" in message(tmp_path / "gone.model")
    assert "no such file" in message(tmp_path)
    assert "unknown kind of tokenizer" in message("byte")
    for name in ("a.json", "a.model"):
        (tmp_path / name).write_bytes(b"{broken")
        assert "not a readable tokenizer" in message(tmp_path / name)
    lacking = SPECIAL_TOKENS[:2]
    for spec in (train_bpe(tmp_path / "b.json", lacking), train_sentencepiece(tmp_path / "b.model", special=lacking)):
        assert "lacks <|vision_start|>, <|vision_end|>" in message(spec)


def test_a_panic_of_the_library_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some files make the Rust library panic, which is a BaseException in Python; the fuzzer found one."""

    class PanicException(BaseException):
        pass

    def panic(data: bytes) -> None:
        raise PanicException("range end index out of range")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(module._KINDS, ".json", panic)
    with pytest.raises(UserError, match=r"is not a readable tokenizer \(range end index"):
        load_tokenizer(str(tmp_path))
