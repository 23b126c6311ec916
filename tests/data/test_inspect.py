"""What the viewer shows is what the plan says, by the token-by-token definition of the sequence."""

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megabagel.cli import main
from megabagel.config.schema import Config, SourceConfig
from megabagel.data.formats.shards import write_shards
from megabagel.data.inspect.html import draw_html
from megabagel.data.inspect.mask import COLOURS, HIDDEN, LOSS, RULER, draw_mask, thumbnail
from megabagel.data.inspect.page import _spelled, draw_page
from megabagel.data.inspect.show import show
from megabagel.data.inspect.table import HEADER, as_text, cells
from megabagel.data.inspect.view import ImageView, Kind, SampleView, TextView, view_sample
from megabagel.data.plan.global_plan import Source, open_sources
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from megabagel.sequence.items import Mode
from tests.support.oracle import mask_of, places_of, tokens_of
from tests.support.pictures import file_of, noise
from tests.support.small_run import small_config

SOURCES = ("draw", "caption", "edit", "clips", "notes")


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    config = small_config(shapes)
    return replace(config, data=replace(config.data, drop_text=0.3, drop_vit=0.5, drop_latent=0.3))


@pytest.fixture(scope="module")
def opened(config: Config) -> dict[str, Source]:
    return {source.name: source for source in open_sources(config, load_tokenizer(config.data.tokenizer))}


def view(config: Config, opened: dict[str, Source], source: str, sample: int) -> SampleView:
    return view_sample(config, opened[source], load_tokenizer(config.data.tokenizer), str(sample))


@pytest.fixture(scope="module")
def views(config: Config, opened: dict[str, Source]) -> list[SampleView]:
    """Four samples of every kind."""
    return [view(config, opened, source, sample) for source in SOURCES for sample in range(4)]


def test_an_image_file_that_is_gone_is_named(config: Config, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(file_of(noise(32, 32)))
    items = [{"type": "text", "text": "a"}, {"type": "image", "name": "0.png"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"items": items}))
    entry = SourceConfig(name="loose", path=str(tmp_path / "a.jsonl"), task="t2i")
    loose = replace(config, data=replace(config.data, sources=(entry,)))
    source = {"loose": open_sources(loose, load_tokenizer(loose.data.tokenizer))[0]}
    (tmp_path / "0.png").unlink()
    with pytest.raises(UserError, match=r"loose, sample line 1, item 1: image is missing .*Choose another --sample"):
        view(loose, source, "loose", 0)


def test_splits_are_those_of_the_definition(views: list[SampleView]) -> None:
    for shown in views:
        dropped = {number for number, segment in enumerate(shown.segments) if segment.dropped}
        tokens = tokens_of([segment.item for segment in shown.segments], dropped)
        assert len(tokens) == shown.pack.tokens == sum(segment.tokens for segment in shown.segments)
        for number, segment in enumerate(shown.segments):
            rows = [token for token in tokens if token.segment == number]
            assert tokens[segment.rows] == rows and bool(rows) != segment.dropped
            if not rows:
                continue
            assert segment.mode == rows[0].mode.name.lower()
            assert segment.rope == (rows[0].position, rows[-1].position)
            assert segment.loss == sum(bool(row.label) or row.flow for row in rows)
            assert bool(segment.group) == (rows[0].mode is Mode.NOISE) == (segment.timestep is not None)
            assert ("chain" in segment.group) == (rows[0].chain is not None)
    drops = [(segment.dropped, segment.probability) for shown in views for segment in shown.segments]
    assert {gone for gone, _ in drops} == {True, False}
    assert all(probability > 0 for gone, probability in drops if gone)
    assert {segment.kind for shown in views for segment in shown.segments} == set(Kind)


def test_every_group_of_a_clip_has_a_number_of_its_own(views: list[SampleView]) -> None:
    clips = [[segment.group for segment in shown.segments if segment.group] for shown in views if shown.task == "video"]
    assert any(len(groups) > 1 for groups in clips)
    assert all(groups == [f"{number} of chain 0" for number in range(len(groups))] for groups in clips)


def test_the_mask_picture_is_the_mask(views: list[SampleView]) -> None:
    for shown in views[::3]:
        dropped = {number for number, segment in enumerate(shown.segments) if segment.dropped}
        dense = mask_of(places_of([tokens_of([segment.item for segment in shown.segments], dropped)]))
        colours = np.array([COLOURS[kind] for kind in shown.kinds()])
        expected = np.where(dense[..., None], colours[None], HIDDEN)
        margin = 2 * RULER + 8
        for side in (len(dense), 2 * len(dense) + 1):
            page = np.array(draw_mask(shown, side))
            scale = side // len(dense)
            found = page[margin::scale, margin::scale]
            starts = {segment.rows.start for segment in shown.segments}  # white lines lie on the borders
            inside = np.array([row not in starts for row in range(len(dense))])
            assert (found[inside][:, inside] == expected[inside][:, inside]).all()
            losses = (page[margin::scale, 0] == LOSS).all(-1)
            assert (losses == (shown.pack.ce_S | shown.pack.noised_S)).all()


def test_a_long_sample_is_averaged(views: list[SampleView]) -> None:
    shown = max(views, key=lambda shown: shown.pack.tokens)
    count = shown.pack.tokens
    colours = np.array([COLOURS[kind] for kind in shown.kinds()], np.float32)
    whole = thumbnail(shown, colours, np.arange(count + 1)).astype(float)
    edges = np.array([0, 3, 4, 11, count // 2, count])
    small = thumbnail(shown, colours, edges)
    for i in range(5):
        for j in range(5):
            block = whole[edges[i] : edges[i + 1], edges[j] : edges[j + 1]].mean((0, 1))
            assert np.abs(small[i, j] - block).max() <= 0.5 + 1e-3, (i, j)


def test_texts_and_images_are_those_of_the_sample(config: Config, opened: dict[str, Source]) -> None:
    shown = view(config, opened, "edit", 1)
    document = opened["edit"].index.documents[1]
    texts = [content for content in shown.contents if isinstance(content, TextView)]
    images = [content for content in shown.contents if isinstance(content, ImageView)]
    assert ["".join(text.tokens) for text in texts] == [opened["edit"].index.text(item) for item in document.texts]
    assert [image.size for image in images] == [(item.height, item.width) for item in document.images]
    for image in images[:-1]:
        vae, vit = (next(branch for branch in image.branches if branch.name == name) for name in ("VAE", "ViT"))
        assert vae.pixels.shape == (vae.grid[0] * 16, vae.grid[1] * 16, 3)
        assert vit.pixels.shape == (vit.grid[0] * 14, vit.grid[1] * 14, 3)
    assert [branch.name for branch in images[-1].branches] == ["VAE"]
    file = Image.open(io.BytesIO(opened["edit"].index.read(document.images[0].member))).convert("RGB")
    pixels = images[0].branches[0].pixels
    same = file.resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
    assert np.abs(pixels.astype(int) - np.array(same)).max() <= 1


def test_the_text_form_has_a_line_per_split(views: list[SampleView]) -> None:
    for shown in views:
        lines = as_text(shown).splitlines()
        for number, segment in enumerate(shown.segments):
            assert lines[4 + number].split() == " ".join(cells(number, segment)).split()
        assert lines[3].split() == " ".join(HEADER).split()
        assert f"{shown.pack.tokens} tokens: " in lines[1]


def test_the_html_page_needs_no_other_file(views: list[SampleView]) -> None:
    for shown in views[::3]:
        page = draw_html(shown)
        sources = re.findall(r'src="([^"]*)"', page)
        pictures = [Image.open(io.BytesIO(base64.b64decode(s.removeprefix("data:image/png;base64,")))) for s in sources]
        branches = [
            branch for content in shown.contents if isinstance(content, ImageView) for branch in content.branches
        ]
        assert len(pictures) == 1 + len(branches)
        for picture, branch in zip(pictures[1:], branches, strict=True):
            assert (np.array(picture) == branch.pixels).all()
        assert "href" not in page and "<script" not in page
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page)
        found = [[re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)] for row in rows[1:]]
        assert found == [list(cells(number, segment)) for number, segment in enumerate(shown.segments)]


def test_the_png_page_shows_the_mask(views: list[SampleView]) -> None:
    for shown in views[::4]:
        page = np.array(draw_page(shown))
        mask = np.array(draw_mask(shown, 560))
        height, width = mask.shape[:2]
        tops = [top for top in range(200) if (page[top + height - 1, 48 : 48 + width] == mask[-1]).all()]
        windows = [top for top in tops if (page[top : top + height, 48 : 48 + width] == mask).all()]
        assert len(windows) == 1


@pytest.mark.parametrize(
    ("text", "expected"), [("a \u2192 b", "a > b"), ("Gr\u00fc\u00dfe", "Gru?e"), ("a\nb", "a\u00b7b"), ("\u4e2d", "?")]
)
def test_what_the_font_lacks_is_spelled_out(text: str, expected: str) -> None:
    assert _spelled(text) == expected


def test_odd_texts_are_escaped(tmp_path: Path) -> None:
    caption = '<b>&amp; \u4e2d\u6587 "q"</b>'
    write_shards(tmp_path, "pairs", [("a", {"png": file_of(noise(40, 30)), "txt": caption.encode()})], 10)
    source = SourceConfig("pairs", str(tmp_path / "pairs-*.tar"), "i2t")
    config = Config(data=replace(Config().data, sources=(source,)))
    out = tmp_path / "new" / "page.html"
    printed = show(config, None, "a", out)
    page = out.read_text("utf-8")
    assert "&lt;" in page and "<b>" not in page
    assert "task i2t" in printed and list(out.parent.iterdir()) == [out]


def test_the_command(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    glob = f"{shapes}/edits-*.tar"
    assert (
        main(["data", "inspect", glob, "--task", "edit", "--sample", "000003", "--out", str(tmp_path / "a.png")]) == 0
    )
    by_key = capsys.readouterr().out
    assert by_key.startswith("000003   source source, task edit, sample 3 of 30\n")
    assert Image.open(tmp_path / "a.png").format == "PNG"
    assert main(["data", "inspect", glob, "--task", "edit", "--sample", "3"]) == 0
    assert capsys.readouterr().out == by_key


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--sample", "30"],
            "--sample 30: source source has no sample of this key or number. Expected a number from 0 to 29",
        ),
        (["--source", "nosuch"], "--source nosuch: the config has no source of this name. Expected one of source."),
        (["--out", "page.pdf"], "--out page.pdf: expected a file that ends in .html or .png."),
        (["train.seed=3"], "settings belong to a CONFIG"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str, shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", f"{shapes}/edits-*.tar", "--task", "edit", *words]) == 2
    assert message in capsys.readouterr().err


def test_settings_reach_the_sample(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = {"name": "edits", "path": "edits-*.tar", "task": "edit"}
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"root": str(shapes), "sources": [source]}}))
    words = ["data", "inspect", str(tmp_path / "run.yaml"), "data.drop_text=1", "--source", "edits"]
    assert main([*words, "data.vae_resize.min_size=32", "data.vae_resize.max_size=32"]) == 0
    printed = capsys.readouterr().out
    assert "dropped (1)" in printed and "VAE 16 x 32" in printed
