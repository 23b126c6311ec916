"""All layouts in one mixture: what a step holds is what the files say, on every path from the plan to the words."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from megabagel.config.schema import Config, SourceConfig
from megabagel.data.decode import Request
from megabagel.data.decode.host import HostEngine
from megabagel.data.documents import ImageItem, TextItem
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.sequence.images import vae_images
from megabagel.sequence.items import Text, Vit
from tests.data.test_loader import filled
from tests.support.batches import token_ids
from tests.support.config_tree import change
from tests.support.pictures import file_of, noise
from tests.support.small_run import small_config

LONG = " ".join(["long"] * 260)
"""More than an index holds."""
CAPTIONS = [{"a": f"scene {n}", "b": f"a picture, the {n}th"} for n in range(5)]
STEPS = [[["redder", "more red"], ["brighter"]], [["crop"], ["turn"]], [["blur", "soften"], ["sharpen"], ["undo"]]]
TALKS = [("Which <image> is <image> like?", "Neither."), ("<image>", "Nothing."), ("Hm?", "Yes.")]


def picture(n: int) -> bytes:
    """32 + n by 40 pixels."""
    return file_of(noise(32 + n, 40))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in the released layouts."""
    root = tmp_path_factory.mktemp("sources")
    rows = {"image": [picture(n) for n in range(5)], "captions": [json.dumps(row) for row in CAPTIONS]}
    pq.write_table(pa.table(rows), root / "t2i.parquet", row_group_size=2)
    images = [[picture(10 * n + i) for i in range(len(row) + 1)] for n, row in enumerate(STEPS)]
    steps = pa.array(STEPS, pa.list_(pa.list_(pa.string())))
    pq.write_table(pa.table({"image_list": images, "instruction_list": steps}), root / "edit.parquet", row_group_size=2)
    (root / "pictures").mkdir()
    for n in range(3):
        (root / "pictures" / f"{n}.png").write_bytes(picture(n))
    talks = [
        {
            "image": [f"{n}.png" for n in range(question.count("<image>"))],
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
        }
        for question, answer in TALKS
    ]
    (root / "vlm.jsonl").write_text("\n".join(map(json.dumps, talks)))
    pq.write_table(pa.table({"text": ["a note", LONG, "another"]}), root / "notes.parquet")
    return root


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    sources = (
        SourceConfig("draw", "t2i.parquet", "t2i"),
        SourceConfig("edit", "edit.parquet", "edit"),
        SourceConfig("talk", "vlm.jsonl", "i2t", images="pictures"),
        SourceConfig("notes", "notes.parquet", "text"),
    )
    values = {"sources": sources, "tokenizer": "bytes", "min_tokens": 900, "max_tokens": 2048}
    return change(
        small_config(root), {f"data.{name}": value for name, value in values.items()} | {"data.drop_text": 0.0}
    )


TEXTS = {
    "draw": {caption for row in CAPTIONS for caption in row.values()},
    "edit": {text for row in STEPS for step in row for text in step}
    | {"redder.", "more red.", "crop.", "blur. sharpen.", "soften. sharpen.", "sharpen."},
    "talk": {"Which", "is", "like?", "Neither.", "Nothing.", "Hm?", "Yes."},
    "notes": {"a note", LONG, "another"},
}
"""Every text that a visit of a source may hold."""


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_text_of_the_layouts_comes_up_and_no_other(config: Config, workers: int) -> None:
    _, batches = filled(change(config, {"data.workers": workers}), steps=12)
    tokenizer = ByteTokenizer()
    seen: dict[str, Counter[str]] = {name: Counter() for name in TEXTS}
    for batch in batches:
        words = token_ids(batch)
        for sample in batch.pack.samples:
            for item in sample.items:
                if isinstance(item, Text):
                    ids, words = words[1 : item.length + 1], words[item.length + 2 :]
                    seen[sample.key.source][tokenizer.decode(ids)] += 1
                else:
                    words = words[2:]
        assert not words
    assert {name: set(texts) for name, texts in seen.items()} == TEXTS


def test_pixels_are_those_of_the_chosen_images(config: Config) -> None:
    made, batches = filled(config, steps=3)
    stride, looked = config.model.latent_stride, 0
    for batch in batches:
        for image, pixels in zip(vae_images(batch.pack), batch.pixels, strict=True):
            key = batch.pack.samples[image.sample].key
            index = made.plan.sources[key.source].index
            item = index.documents[key.sample].items[image.slot]
            assert isinstance(item, ImageItem)
            request = Request(index.read(item.member), ((image.rows * stride, image.cols * stride),))
            (views,) = HostEngine()([request])
            assert not isinstance(views, Exception)
            assert torch.equal(pixels, views[0])
        looked += sum(isinstance(item, Vit) for sample in batch.pack.samples for item in sample.items)
    assert looked


def test_sizes_of_a_plan_are_those_of_its_contents(config: Config) -> None:
    """Every wording has the ids that the index counted, whichever is chosen."""
    made, _ = filled(config, steps=1)
    for source in made.plan.sources.values():
        for document in source.index.documents:
            for item in document.items:
                if isinstance(item, TextItem):
                    assert item.n_ids == len(source.index.text(item).encode())
