"""Task `reconstruct`: what the ViT sees of an image, then the same image as a flow target."""

import json
from pathlib import Path

from megabagel.config.schema import Config
from megabagel.data.documents import assign_roles
from megabagel.data.index.index import build_index
from megabagel.data.plan.expand import Expander
from megabagel.sequence.items import Latent, Text, Vit
from megabagel.sequence.keys import SampleKey
from tests.data.test_index import BYTES
from tests.support.pictures import file_of, noise


def test_look_prompt_target(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file_of(noise(48, 32)))
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "text": "Describe the image."}) + "\n")
    index = build_index([tmp_path / "a.jsonl"], BYTES, "reconstruct")
    (document,) = index.documents
    assert [item.role for item in document.items] == ["look", "condition", "target"]
    assert document.images[0].member == document.images[1].member
    assert assign_roles("reconstruct", document) == document
    items = Expander.of(Config()).items(document, "reconstruct", SampleKey(0, "a", 0, 0))
    assert [type(item) for item in items] == [Vit, Text, Latent]
    assert not items[0].droppable and items[1].droppable and items[2].noised and not items[1].loss
