"""Boxes, judges, training records and their page, on pages whose contents are known."""

import http.server
import json
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import RewardConfig
from megabagel.data.index.index import build_index
from megabagel.errors import UserError
from megabagel.posttrain import boxes as boxes_module
from megabagel.posttrain.boxes import BoxOptions, find_boxes, usable
from megabagel.posttrain.journal import read_records
from megabagel.posttrain.judges import JudgeOptions
from megabagel.posttrain.judging import format_records, judge
from megabagel.posttrain.show import show
from tests.data.test_index import BYTES
from tests.posttrain.conftest import page_prompts, pixels


class Scripted:
    """A model that answers by a function of (question, options)."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, []
        self.source = types.SimpleNamespace(digest="d")

    def ask(self, images: Any, question: str, think: bool = False, **options: Any) -> str:
        self.asked.append((question, options))
        return str(self.answer(images[0], question, options))


def records(work: Path, name: str) -> list[dict[str, Any]]:
    return list(read_records(work / name, "image_file"))


def test_figures_of_the_drawn_world(work: Path) -> None:
    assert find_boxes(work, BoxOptions()) == {"pictures": 4, "boxes": 1 + 2 + 0 + 1, "filtered": 0}
    assert [len(record["boxes"]) for record in records(work, "boxes.jsonl")] == [1, 2, 0, 1]
    (left, top, right, bottom) = records(work, "boxes.jsonl")[0]["boxes"][0]
    page = pixels(work / "images" / "0_0.png").astype(int)
    paper = page[0, 0]
    assert np.abs(page[top:bottom, left:right] - paper).sum(2).any() and right - left < 40
    assert find_boxes(work, BoxOptions())["pictures"] == 0, "nothing twice"
    with pytest.raises(UserError, match="was begun with method = 'scenes', now 'grid'"):
        find_boxes(work, BoxOptions("grid"))


def test_grid_model_and_filter(work: Path) -> None:
    def answer(image: Any, question: str, options: Any) -> str:
        if "List the bounding box" in question:
            return "[0, 0, 32, 32] cat\n[40, 40, 99, 99]\n[5, 5, 5, 9]\n[0,0,32,32]"
        return "No." if image.size == (24, 24) else "yes"

    model = Scripted(answer)
    assert find_boxes(work, BoxOptions("model", keep_named=True), model) == {"pictures": 4, "boxes": 4, "filtered": 4}
    assert records(work, "boxes.jsonl")[0]["boxes"] == [[0, 0, 32, 32]]
    assert boxes_module._cells((5, 3), 2) == [(0, 0, 2, 1), (2, 0, 5, 1), (0, 1, 2, 3), (2, 1, 5, 3)]
    small = usable([(0, 0, 1, 1), (-5, 0, 8, 8), (0, 0, 8, 8), (9, 9, 4, 4)], (64, 64), BoxOptions())
    assert small == [(0, 0, 8, 8)]
    assert len(usable([(0, 0, n, n) for n in range(8, 40)], (64, 64), BoxOptions())) == 10


def test_unknown_method_and_absent_model(work: Path) -> None:
    for options in (BoxOptions("yolo"), BoxOptions("model"), BoxOptions("scenes", keep_named=True), BoxOptions("sam")):
        with pytest.raises(UserError, match="boxes: "):
            find_boxes(work, options)
        (work / "boxes.settings.json").unlink(missing_ok=True)


@pytest.fixture
def detector() -> Iterator[tuple[str, list[bytes]]]:
    """A detector over HTTP; fails the first time."""
    replies = [b"", b'{"boxes": [[1, 2, 30, 40]]}']

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
            self.send_response(200 if reply else 503)
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/boxes", replies
    server.shutdown()
    server.server_close()


def test_a_detector_over_http(work: Path, detector: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address, replies = detector
    monkeypatch.setattr(boxes_module, "PATIENCE_S", 0.01)
    assert find_boxes(work, BoxOptions(address))["boxes"] == 4
    replies[:] = [b'{"boxes": [["1", 2, 3, 4]]}']
    (work / "boxes.jsonl").unlink()
    with pytest.raises(UserError, match="expected"):
        find_boxes(work, BoxOptions(address))


def test_sam_keeps_the_largest_first(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Masks:
        def __init__(self, model: Any) -> None:
            assert model == "sam.pth"

        def generate(self, image: np.ndarray) -> list[dict[str, Any]]:
            assert image.shape == (64, 64, 3)
            return [{"bbox": [1.0, 2.0, 10.0, 20.0], "area": 9}, {"bbox": [0.0, 0.0, 64.0, 32.0], "area": 99}]

    package = types.ModuleType("segment_anything")
    package.SamAutomaticMaskGenerator = Masks  # type: ignore[attr-defined]
    package.sam_model_registry = {"vit_h": lambda checkpoint: Path(checkpoint).name}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "segment_anything", package)
    (tmp_path / "sam.pth").write_bytes(b"")
    find_boxes(work, BoxOptions("sam", weights=str(tmp_path / "sam.pth")))
    assert records(work, "boxes.jsonl")[0]["boxes"] == [[0, 0, 64, 32], [1, 2, 11, 22]]


def test_the_exact_judge(work: Path) -> None:
    assert judge(work, JudgeOptions()) == {"pictures": 4, "scores without a number": 0}
    right, also, empty, other = records(work, "judged.jsonl")
    assert [one["overall"] for one in (right, also)] == [1.0, 1.0] and right["layout"] == 1.0
    assert all(region["score"] == 1.0 for region in right["regions"] + also["regions"])
    assert empty["layout"] < 1 and empty["overall"] <= 0 and other["overall"] <= 0
    assert judge(work, JudgeOptions())["pictures"] == 0


def test_the_model_as_judge_of_the_drawn_world(work: Path) -> None:
    """A model that sees perfectly gives the verdicts of the exact judge; what it cannot name gets no score."""
    from megabagel.evaluation.shapes_vision import find_figures

    def sees(image: Any, question: str, options: Any) -> str:
        place = question.removeprefix("what is at the ").removesuffix("?")
        there = [f for f in find_figures(np.asarray(image)) if f.place == place]
        return f"a {there[0].colour} {there[0].shape}" if there else "nothing"

    judge(work, JudgeOptions(by="scenes"), Scripted(sees))
    seen = records(work, "judged.jsonl")
    (work / "judged.jsonl").unlink()
    (work / "judged.settings.json").unlink()
    judge(work, JudgeOptions())
    for mine, right in zip(seen, records(work, "judged.jsonl"), strict=True):
        assert (mine["layout"], mine["overall"]) == (right["layout"], right["overall"])
        assert sorted(r["score"] for r in mine["regions"]) == sorted(r["score"] for r in right["regions"])
    (work / "judged.jsonl").unlink()
    (work / "judged.settings.json").unlink()
    counts = judge(work, JudgeOptions(by="scenes"), Scripted(lambda *_: "zzz"))
    assert counts["scores without a number"] == 16
    assert {one["layout"] for one in records(work, "judged.jsonl")} == {None}
    assert not any(one["regions"] for one in records(work, "judged.jsonl"))


def test_retries_have_a_temperature_and_another_seed(work: Path) -> None:
    find_boxes(work, BoxOptions("grid"))

    def answer(image: Any, question: str, options: Any) -> str:
        if "arranged" in question:
            return "Score: 0\nReason: fine"
        if not options.get("temperature"):
            return "Region ID: 1\nScore: 0.5\n---\nRegion ID: 2\nScore: 95%\n---\nRegion ID: 4\nScore: 0.1"
        return "Region ID: 1\nScore: -1\n---\nRegion ID: 2\nScore: **-0.5**"

    model = Scripted(answer)
    counts = judge(work, JudgeOptions(by="model"), model)
    assert counts == {"pictures": 4, "scores without a number": 4, "no score": 4}
    one = records(work, "judged.jsonl")[0]
    assert [region["score"] for region in one["regions"]] == [0.5, -0.5, None, 0.1], "an answer is not asked again"
    assert one["layout"] == 0.0 and one["failures"] == {"regions[2]": "no score"} and one["attempts"] == 3
    asked = [options for question, options in model.asked if "Regions" in question][:3]
    assert [options.get("temperature") for options in asked] == [None, 0.7, 0.7]
    assert asked[1]["seed"] != asked[2]["seed"]
    assert "[0, 0, 32, 32]" in model.asked[0][0] and page_prompts()[0].text in model.asked[0][0]
    counts = format_records(work)
    assert counts == {"records": 4, "regions without a score": 4}, "an honest layout score of 0 stays"
    line = json.loads((work / "train.jsonl").read_text().splitlines()[0])
    assert line["vlm_rewards"][0] == {"object": "global_layout_reward", "bbox": [0, 0, 64, 64], "score": 0.0}


def test_the_judge_model_needs_boxes_and_a_model(work: Path) -> None:
    with pytest.raises(UserError, match="name a checkpoint"):
        judge(work, JudgeOptions(by="model"))
    (work / "judged.settings.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"has no boxes of 4 pictures, first 0_0.png"):
        judge(work, JudgeOptions(by="model"), Scripted(lambda *_: ""))


def test_a_judge_that_always_fails_leaves_nothing_to_train_on(work: Path) -> None:
    find_boxes(work, BoxOptions("grid"))
    judge(work, JudgeOptions(by="model", retries=0, overall=True), Scripted(lambda *_: "What a picture!"))
    one = records(work, "judged.jsonl")[0]
    assert one["layout"] is None and one["overall"] is None and len(one["failures"]) == 6
    assert format_records(work) == {
        "records": 0, "regions without a score": 16, "layouts without a score": 4,
        "pictures left out: no score at all": 4,
    }  # fmt: skip


def test_records_are_a_source_of_task_reward(work: Path) -> None:
    judge(work, JudgeOptions())
    assert format_records(work)["records"] == 4
    for task in ("reward", "t2i"):
        index = build_index([work / "train.jsonl"], BYTES, task, images=work / "images")
        assert len(index.documents) == 4 and not index.skipped


def test_the_best_candidate_is_the_second_target(work: Path) -> None:
    judge(work, JudgeOptions())
    lines = (work / "judged.jsonl").read_text().splitlines()
    same = [{**json.loads(line), "id": "one prompt"} for line in lines]
    (work / "judged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in same))
    assert format_records(work, pairs=True)["pairs"] == 3
    found = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    assert {record["good_image_file"] for record in found} == {"0_0.png"}
    index = build_index([work / "train.jsonl"], BYTES, "reward", images=work / "images")
    assert [len(document.images) for document in index.documents] == [1, 2, 2, 2]


def test_the_page_shows_every_number(work: Path, tmp_path: Path) -> None:
    judge(work, JudgeOptions())
    assert show(work, tmp_path / "page.html", RewardConfig(), 16, pngs=tmp_path / "pngs") == 4
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img") == 16 and "http" not in page and page_prompts()[1].text in page
    assert "layout +1.00, whole picture +1.00" in page
    assert sorted(path.name for path in (tmp_path / "pngs").iterdir()) == [f"{n}_0.png" for n in range(4)]
    assert pixels(tmp_path / "pngs" / "0_0.png").shape == (256, 4 * 256 + 3 * 8, 3)


def test_stages_name_what_is_missing(tmp_path: Path, work: Path) -> None:
    for stage, name in (
        (lambda: find_boxes(tmp_path / "a", BoxOptions()), "posttrain generate"),
        (lambda: judge(tmp_path / "b", JudgeOptions()), "posttrain generate"),
        (lambda: format_records(tmp_path / "c"), "posttrain judge"),
        (lambda: show(tmp_path / "c", tmp_path / "x.html", RewardConfig(), 16), "posttrain judge"),
    ):
        with pytest.raises(UserError, match=name):
            stage()
    (work / "images" / "1_0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1_0.png: cannot be read"):
        judge(work, JudgeOptions())
    assert [one["image_file"] for one in records(work, "judged.jsonl")] == ["0_0.png"], "what was judged stays"
