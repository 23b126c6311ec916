"""Measures against independent definitions and pictures made for them."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from megabagel.curation.measure import look as looking
from megabagel.curation.measure.look import look
from megabagel.curation.measure.pictures import clarity, difference_hash, near_groups, text_density
from megabagel.curation.measure.texts import content_words, count_tokens, first_tokens, language
from tests.support.pictures import file_of, noise


@pytest.mark.parametrize("bits", [0, 1, 3, 7])
def test_near_groups_are_the_components_of_all_pairs(bits: int) -> None:
    rng = np.random.default_rng(bits)
    seeds = rng.integers(0, 2**63, 12, dtype=np.uint64)
    hashes = []
    for number in range(60):
        value = int(seeds[number % 12])
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            value ^= 1 << int(bit)
        hashes.append(value)
    labels = list(range(60))
    for _ in range(60):
        for i in range(60):
            for j in range(i):
                if (hashes[i] ^ hashes[j]).bit_count() <= bits:
                    labels[i] = labels[j] = min(labels[i], labels[j])
    assert near_groups(np.array(hashes, dtype=np.uint64), bits).tolist() == labels


def test_a_hash_survives_scaling_and_compression_and_tells_pictures_apart() -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (9, 12), dtype=np.uint8)).resize((400, 300), Image.Resampling.BICUBIC)
        for _ in range(2)
    ]

    def hash_of(image: Image.Image, **how: object) -> int:
        file = io.BytesIO()
        image.save(file, **how)  # type: ignore[arg-type]
        return difference_hash(look(file.getvalue()).grey)

    first, second = (hash_of(image, format="PNG") for image in images)
    small = hash_of(images[0].resize((200, 150)), format="JPEG", quality=70)
    assert (first ^ small).bit_count() <= 3 and (first ^ second).bit_count() > 10


def test_print_is_told_from_pictures() -> None:
    page = Image.new("L", (640, 480), 250)
    draw = ImageDraw.Draw(page)
    for line in range(24):
        draw.text(
            (20, 10 + 19 * line), f"{line}: the quick brown fox jumps over the lazy dog, and again and again. " * 2, 10
        )
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(0, 256, (12, 16), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    drawing = Image.new("L", (640, 480), 255)
    for number in range(12):
        ImageDraw.Draw(drawing).ellipse(
            (40 * number, 30 * number, 40 * number + 90, 30 * number + 90), outline=0, width=3
        )
    photo = noise(640, 480).convert("L").filter(ImageFilter.GaussianBlur(1))
    density = [text_density(np.asarray(image)) for image in (page, soft, drawing, photo)]
    assert density[0] > 0.4 and max(density[1:]) < 0.05


def test_clarity_at_a_fixed_side_compares_sizes() -> None:
    small = noise(256, 256)
    large = small.resize((2048, 2048), Image.Resampling.BICUBIC)
    whole = [clarity(np.asarray(image.convert("L"))) for image in (small, large)]
    fixed = [clarity(np.asarray(image.convert("L")), 256) for image in (small, large)]
    assert whole[0] / whole[1] > 50 and fixed[0] / fixed[1] < 3
    assert clarity(np.zeros((2, 9), np.uint8)) == 0.0


def test_looks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "KEPT", 2)
    looking._looks.clear()
    files = [file_of(noise(20, 10, seed=seed)) for seed in range(5)]
    for data in [*files, files[-1]]:
        assert (look(data).height, look(data).width) == (10, 20)
    assert len(looking._looks) == 2


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("This is what you see in the picture, and it is easy to use.", "en"),
        ("Der Filter macht das Bild unscharf und zeigt danach einen Hinweis, der nicht auf der Seite ist.", "de"),
        ("Le filtre rend l'image floue et montre un message qui n'est pas dans la page.", "fr"),
        ("El filtro hace que la imagen no se vea, y por eso muestra un mensaje en la página.", "es"),
        ("Фильтр делает изображение размытым, и на странице это не видно, как в книге.", "ru"),
        ("これは画像を示す文です。", "ja"),
        ("过滤器使图像模糊", "zh"),
        ("xyzzy plugh 123", ""),
        ("", ""),
    ],
)
def test_languages(text: str, code: str) -> None:
    assert language(text) == code


def test_tokens_are_counted_and_cut_at_sentences() -> None:
    assert count_tokens("A cat, unbelievably") == 1 + 1 + 1 + 2
    text = "One two three. Four five, six seven eight nine ten."
    assert first_tokens(text, 99) == text
    assert first_tokens(text, 6) == "One two three."
    assert first_tokens("four five, six seven eight", 4) == "four five"
    assert first_tokens("four five six", 2) == "four five"
    assert content_words("A red bicycle and a red dog in Rome") == ["red", "bicycle", "dog", "rome"]
