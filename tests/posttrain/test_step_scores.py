"""Scores per sampling step: the judged picture is where the velocity points to (SRUM figure 4)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megabagel.errors import UserError
from megabagel.inference.programs import Step
from megabagel.posttrain.judges import Scores
from megabagel.posttrain.step_scores import step_scores, write_scores


def test_scores_are_means_over_the_prompts_that_have_one(model: Any) -> None:
    judged: list[np.ndarray] = []

    def judge(picture: Image.Image, record: dict[str, Any], boxes: Any) -> Scores:
        judged.append(np.asarray(picture))
        assert record["item"] == {"tag": "t"} and boxes == []
        if record["prompt"] == "a cat":
            return Scores([{"score": 0.5}, {"score": -0.1}, {"score": None}], layout=0.25)
        return Scores([], layout=None if len(judged) == 4 else 0.75)

    prompts = [{"id": "0", "prompt": "a cat", "tag": "t"}, {"id": "1", "prompt": "a dog", "tag": "t"}]
    found = step_scores(model, prompts, judge, size=(32, 16), points=4)
    np.testing.assert_allclose(found, [[0.25, 0.2], [0.5, 0.2], [0.5, 0.2]])
    # The last step's prediction is the finished picture, since its timestep ends at 0.
    (finished,) = model.generate("a cat", size=(32, 16), points=4)
    assert np.array_equal(judged[2], finished.pixels) and not np.array_equal(judged[0], judged[2])


def test_the_predicted_picture_is_x_0(model: Any) -> None:
    request = model.submit_draw(["a cat"], size=(32, 16), points=4)
    (first, *_) = [event for event in model.stream(request) if isinstance(event, Step)]
    assert first.t == 1 and torch.is_tensor(first.x_t[0])


def test_table_and_charts(tmp_path: Path) -> None:
    scores = np.array([[0.0, np.nan], [0.5, -1.0], [1.0, 0.25]])
    text = write_scores({"base": scores, "other": scores[:2]}, tmp_path, {"count": 2})
    assert "| base | layout | 0.000 | 0.500 | 1.000 |" in text and "| other | detail | nan | -1.000 |  |" in text
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert stored["count"] == 2 and stored["scores"]["base"]["detail"] == [None, -1.0, 0.25]
    assert {path.name for path in tmp_path.glob("*.png")} == {"steps_layout.png", "steps_detail.png"}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Any, capsys: Any) -> None:
    from megabagel.cli import main
    from megabagel.inference import load

    monkeypatch.setattr(load, "open_source", lambda *_: model.source)
    words = ["runs/a", "runs/b", "--prompts", "scenes:2", "--size", "32x32", "--steps", "3", "--out", str(tmp_path)]
    assert main(["posttrain", "steps", *words]) == 0
    stored = json.loads((tmp_path / "steps.json").read_text())
    assert stored["scores"]["runs/a"] == stored["scores"]["runs/b"] and len(stored["scores"]["runs/a"]["layout"]) == 2
    assert "| runs/b | detail |" in capsys.readouterr().out


def test_no_prompt(model: Any) -> None:
    with pytest.raises(UserError, match="no prompt to draw"):
        step_scores(model, [], lambda *_: Scores())
