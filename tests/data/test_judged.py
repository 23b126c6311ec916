"""Sources of task `reward`: records on disk to weights of latent tokens, and records that are refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import Config, ResizeConfig, RewardConfig, SourceConfig
from megabagel.data.decode import choose_engine
from megabagel.data.index.index import build_index
from megabagel.data.load.collate import Filled, Filler
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.plan.planned_sample import PackPlan, Task
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.sequence.batch import BatchBuilder
from megabagel.sequence.rank_rows import RankPlace
from megabagel.sequence.sizes import pack_size
from tests.data.test_index import BYTES
from tests.support.pictures import file_of, noise
from tests.support.small_run import small_config, sources_of

SIZES = {"0.png": (48, 32), "1.png": (50, 70), "good.png": (48, 32), "note.png": (32, 32)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, (width, height) in SIZES.items():
        (tmp_path / name).write_bytes(file_of(noise(width, height)))
    return tmp_path


def own(image: str, *regions: Any, **more: Any) -> dict[str, Any]:
    listed = [{"box": box, "score": score} for box, score in regions]
    return {"image": image, "prompt": f"p {image}", "regions": listed, **more}


def released(image: str, *regions: Any, layout: float | None = None, good: str | None = None) -> dict[str, Any]:
    width, height = SIZES[image]
    rewards = [{"object": "thing", "bbox": box, "score": score} for box, score in regions]
    if layout is not None:
        rewards.insert(0, {"object": "global_layout_reward", "bbox": [0, 0, width, height], "score": layout})
    return {"bad_image_file": image, "good_image_file": good or image, "prompt": f"p {image}", "vlm_rewards": rewards}


def config_of(folder: Path, *records: dict[str, Any], task: Any = "reward", **reward: Any) -> Config:
    (folder / "judged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = small_config(folder)
    data = replace(
        config.data,
        sources=(SourceConfig("judged", "judged.jsonl", task),),
        tokenizer="bytes",
        vae_resize=ResizeConfig(max_size=64, min_size=16),
    )
    return replace(config, data=data, model=replace(config.model, vocab=512), reward=RewardConfig(**reward))


def filled(config: Config, first: bool = True) -> Filled:
    """All documents of the source as one pack of one rank."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    config = replace(config, data=replace(config.data, max_tokens=512, drop_text=0.0))
    plan = GlobalPlan(sources_of(config), config)
    batches = BatchBuilder(config, RankPlace(first=first), lambda *_: None)
    filler = Filler.of(plan, tokenizer, choose_engine("host"), batches, None)
    documents = tuple(plan.sources["judged"].index.documents)
    visits = tuple(plan._visit(key) for key in map(plan_key, range(len(documents))))
    return filler(Task(0, 0, PackPlan.of(visits), documents))


def plan_key(number: int) -> Any:
    from megabagel.sequence.keys import SampleKey

    return SampleKey(5, "judged", number, 0)


def weights_L(batch: Any, name: str = "weight") -> list[float]:
    """Weights by latent token, from the rows of the rank."""
    rows = batch.rows.arrays()
    found = np.zeros(int((rows.latent_g >= 0).sum()), np.float32)
    weight_g = rows.latents.weight_g if name == "weight" else rows.latents.constraint.weight_g
    found[rows.latent_g[rows.latent_g >= 0]] = weight_g[rows.latent_g >= 0]
    return [round(float(weight), 6) for weight in found]


def test_both_layouts_reach_the_rows(folder: Path) -> None:
    records = own("0.png", ([0, 0, 16, 16], 1.0), layout=0.0), released("0.png", ([0, 0, 16, 16], 1.0), layout=0.0)
    batch = filled(config_of(folder, *records)).batch
    assert weights_L(batch) == [0.5 * 1.0 + 0.5, *[0.75] * 5] * 2
    assert batch.rows.arrays().latents.constraint is None, "one picture, one target"


def test_odd_sizes_pool_from_the_stored_picture(folder: Path) -> None:
    # 50 x 70 pixels are trained as 48 x 64: 3 x 4 tokens. The lower half of the stored picture has a score.
    batch = filled(
        config_of(folder, own("1.png", ([0, 35, 50, 70], 1.0), layout=1.0), rule="paper", pooling="area")
    ).batch
    assert weights_L(batch) == [0.5] * 6 + [1.5] * 6


def test_other_tasks_in_the_pack_weigh_one(folder: Path) -> None:
    (folder / "plain.jsonl").write_text(json.dumps({"image": "note.png", "text": "plain"}))
    config = config_of(folder, own("0.png", layout=1.0), constraint=0.25)
    sources = (*config.data.sources, SourceConfig("plain", "plain.jsonl", "t2i"))
    config = replace(config, data=replace(config.data, sources=sources, max_tokens=512, drop_text=0.0))
    plan = GlobalPlan(sources_of(config), config)
    keys = [plan_key(0), replace(plan_key(0), source="plain")]
    filler = Filler.of(
        plan, load_tokenizer("bytes"), choose_engine("host"), BatchBuilder(config, RankPlace(), lambda *_: None), None
    )
    task = Task(0, 0, PackPlan.of(tuple(map(plan._visit, keys))), tuple(map(plan.document, keys)))
    assert weights_L(filler(task).batch) == [0.75] * 6 + [1.0] * 4


def test_good_and_bad_picture(folder: Path) -> None:
    config = config_of(folder, released("0.png", ([0, 0, 16, 16], 1.0), layout=1.0, good="good.png"), own("0.png"))
    batch = filled(config).batch
    assert weights_L(batch) == [1.0, *[0.5] * 5, *[0.75] * 6]
    assert weights_L(batch, "constraint") == [0.5] * 6 + [0.0] * 6
    rows = batch.rows.arrays().latents
    assert rows.start_I.tolist() == [0, 2 * 6 * 64] and rows.constraint.start_I.tolist() == [6 * 64, 2 * 6 * 64]
    assert len(batch.pixels) == 3
    plan = GlobalPlan(sources_of(config), config)
    assert pack_size(batch.pack) == PackPlan.of(tuple(map(plan._visit, map(plan_key, range(2))))).size


def test_later_stages_read_no_scores(folder: Path) -> None:
    assert filled(config_of(folder, own("0.png")), first=False).batch.rows.arrays().latents is None


def test_sft_on_judged_pictures_is_task_t2i(folder: Path) -> None:
    records = own("0.png", ([0, 0, 16, 16], -1.0), layout=-1.0), released("0.png", layout=0.5, good="good.png")
    reward, plain = (filled(config_of(folder, *records, task=task)).batch for task in ("reward", "t2i"))
    assert weights_L(plain) == [1.0] * 12 and len(plain.pixels) == 2
    assert plain.pack.position_S.tolist() == reward.pack.position_S.tolist()
    assert [i.noise_seed for i in plain.pack.latents] == [i.noise_seed for i in reward.pack.latents]


def test_bad_records_are_counted_and_named(folder: Path) -> None:
    good = own("0.png", ([0, 0, 48, 32], 0.5), size=[48, 32])
    bad = [
        own("0.png", ([0, 0, 49, 32], 0.5)),
        own("0.png", ([-1, 0, 4, 4], 0.5)),
        own("0.png", ([4, 4, 4, 9], 0.5)),
        own("0.png", (["0", "0", "9", "9"], 0.5)),
        own("0.png", ([0, 0, 9, 9], 95)),
        own("0.png", ([0, 0, 9, 9], None)),
        own("0.png", size=[1024, 1024]),
        own("0.png", good_image="1.png"),
        own("nowhere.png"),
        {**own("0.png"), "prompt": " "},
    ]
    (folder / "judged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [good, *bad]))
    index = build_index([folder / "judged.jsonl"], BYTES, "reward")
    assert len(index.documents) == 1
    assert Counter(skip.reason for skip in index.skipped) == {
        "reward: box outside of the picture": 2,
        "reward: empty box": 1,
        "reward: not a box": 1,
        "reward: score out of range": 1,
        "reward: not a score": 1,
        "reward: judged at another picture size": 1,
        "reward: good and bad picture differ in size": 1,
        "image is missing": 1,
        "invalid record": 1,
    }
    assert "line 8: reward: judged at another picture size (1024 x 1024, the file has 48 x 32)" in str(index.skipped[6])


def test_plain_pictures_have_no_scores(folder: Path) -> None:
    (folder / "plain.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in ({"image": "0.png", "text": "a"}, own("0.png")))
    )
    index = build_index([folder / "plain.jsonl"], BYTES, "reward")
    assert len(index.documents) == 1 and index.skipped[0].reason == "reward: no scores"


def test_scores_that_changed_since_indexing_cost_the_sample_its_loss(folder: Path) -> None:
    # Longer than the index holds, so that the scores are read from the file again.
    many = [([n, 0, n + 1, 1], 0.5) for n in range(40)]
    config = config_of(folder, own("0.png", *many * 2), own("0.png", ([0, 0, 9, 9], 0.5)))
    plan = GlobalPlan(sources_of(config), config)
    path = folder / "judged.jsonl"
    before = path.stat()
    path.write_text(path.read_text().replace("0.5", "0.4", 1))
    import os

    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    filler = Filler.of(
        plan, load_tokenizer("bytes"), choose_engine("host"), BatchBuilder(config, RankPlace(), lambda *_: None), None
    )
    keys = [plan_key(0), plan_key(1)]
    found = filler(Task(0, 0, PackPlan.of(tuple(map(plan._visit, keys))), tuple(map(plan.document, keys))))
    assert weights_L(found.batch)[:6] == [0.0] * 6 and min(weights_L(found.batch)[6:]) > 0
    assert any("scores lost: changed since it was indexed" in lost.message for lost in found.lost)
    assert np.isnan(found.batch.pixels[0].numpy()).all() and not np.isnan(found.batch.pixels[1].numpy()).any()
