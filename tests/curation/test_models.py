"""The seam to models against a local stand-in of the API: batches, cache, cost, retries, and what bad answers do."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megabagel.curation.draft import Draft, Picture, Text
from megabagel.curation.models.seam import Question, open_models, prompt, usage
from megabagel.curation.recipe import all_steps
from megabagel.curation.steps import Bound, Tally, run_steps
from megabagel.errors import TransientFailure, UserError
from tests.curation.conftest import WEB, Inline, contents, curated
from tests.support.pictures import file_of, noise


@contextmanager
def model(answer: Callable[[str], str | int]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A stand-in of the API: `answer(all texts of a request)` or a status; yields a recipe's `models`, and requests."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = [part for message in body["messages"] for part in _parts(message["content"])]
            seen.append("\n".join(parts))
            said = answer(seen[-1])
            content = {
                "choices": [{"message": {"content": said}}],
                "usage": {"prompt_tokens": 100, "completion_tokens": 7},
            }
            data = json.dumps(content).encode()
            self.send_response(said if isinstance(said, int) else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/v1"
        chat = {"kind": "endpoint", "url": url, "model": "vlm", "checkpoint": "", "concurrency": 4, "timeout": 5.0}
        yield {"chat": {**chat, "rate": 0.0, "prices": [10.0, 100.0]}}, seen
        running.shutdown()


def _parts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [part.get("text") or part["image_url"]["url"][:30] for part in content]


@pytest.fixture(autouse=True)
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_equal_questions_are_paid_once(tmp_path: Path) -> None:
    with model(lambda text: f"about {text[-1]}") as (about, seen):
        models = open_models(about, tmp_path)
        assert models is not None
        questions = [Question("summary", (f"text {n % 3}",), 20) for n in range(7)]
        assert models.ask(questions) == [f"about {n % 3}" for n in range(7)] and len(seen) == 3
        again = open_models(about, tmp_path)
        assert again is not None and again.ask(questions[:4]) == [f"about {n % 3}" for n in range(4)]
        image = file_of(noise(8, 8))
        again.ask([Question("caption", (image,), 20), Question("caption", (image,), 21)])
        assert len(seen) == 5 and "data:image/png;base64" in seen[-1] and prompt("caption") in seen[-1]
    assert usage(tmp_path) == {
        "caption": {"answers": 2, "tokens_in": 200, "tokens_out": 14, "cost": pytest.approx(2 * 0.0017)},
        "summary": {"answers": 3, "tokens_in": 300, "tokens_out": 21, "cost": pytest.approx(3 * 0.0017)},
    }


def test_a_model_that_is_away_costs_no_answer_that_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megabagel.chat_client.LONGEST_WAIT_S", 0.0)
    with model(lambda text: 503 if "text 3" in text else "fine") as (about, seen):
        about["chat"]["concurrency"] = 1
        models = open_models(about, tmp_path)
        assert models is not None
        with pytest.raises(TransientFailure, match=r"models.chat vlm: no answer in 6 tries.*start the same command"):
            models.ask([Question("summary", (f"text {n}",), 20) for n in range(4)])
        assert usage(tmp_path)["summary"]["answers"] == 3 and len(seen) == 3 + 6
    with (
        model(lambda text: 401) as (about, _),
        pytest.raises(UserError, match=r"refused with status 401.*MEGABAGEL_CURATE_KEY"),
    ):
        open_models(about, tmp_path / "b").ask([Question("summary", ("x",), 2)])  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"models.chat: expected url"):
        open_models({"chat": {**about["chat"], "url": ""}}, tmp_path)


def run(
    name: str, answer: Callable[[str], str | int], folder: Path, *drafts: Draft, **options: Any
) -> tuple[list[Draft], Tally]:
    with model(answer) as (about, _):
        tally = Tally(name)
        left = list(run_steps(drafts, [Bound(all_steps()[name], options)], [tally], models=open_models(about, folder)))
    tally.check()
    return left, tally


def test_steps_that_ask(tmp_path: Path) -> None:
    image = Picture("a.png", file_of(noise(8, 8)), alt="an alt text")
    (draft,), _ = run(
        "caption_first", lambda text: "A noisy\nsquare.", tmp_path, Draft("k", (Text("Lead."), image)), by="model"
    )
    assert draft.items[0] == Text("Lead.\n\nA noisy square.\n\n") and draft.items[1] == image
    long = "word " * 400
    (draft,), _ = run(
        "long_texts", lambda text: "Short.", tmp_path, Draft("k", (Text(long), image, Text("few"))), by="model"
    )
    assert [item.text for item in draft.items if isinstance(item, Text)] == ["Short.\n\n", "few"]
    page = Draft("k", (Text("Menu\n\nReal text.\n\n"), image, Text("More.\n\nCopyright")))
    (draft,), _ = run("trim", lambda text: "```json\n[0, 4]\n```", tmp_path, page)
    assert [item.text for item in draft.items if isinstance(item, Text)] == ["Real text.\n\n", "More."]
    for number, lie in enumerate(("I cannot do that", "[0, 1, 2, 3, 4]", "{}")):
        (draft,), _ = run("trim", lambda text, lie=lie: lie, tmp_path / f"lie{number}", page)  # type: ignore[misc]
        assert draft.items == page.items and draft.notes == ("trim: the answer was of no use",)
    topics = [Draft(str(n), (Text(f"page {n}"),)) for n in range(3)]
    kept, tally = run("topic_check", lambda text: ("tutorial", "Design.", "none")[int(text[-1])], tmp_path, *topics)
    assert [draft.meta["topic"] for draft in kept] == ["tutorial", "design"]
    assert tally.documents == {"topic by model: none": 1}


def test_a_run_with_a_model_is_repeatable_and_pays_once(pages: Path, tmp_path: Path, inline: Inline) -> None:
    with model(lambda text: "A caption of noise.") as (about, seen):
        chat = {name: about["chat"][name] for name in ("url", "model", "prices")}
        recipe = {
            **WEB,
            "steps": [*WEB["steps"][:-1], {"caption_first": {"by": "model"}}],
            "models": {"chat": chat},
            "batch": 4,
        }
        report = curated(recipe, pages, tmp_path / "out")
        asked, before = len(seen), contents(tmp_path / "out")
        assert asked == 21 and report.models["caption"]["answers"] == 21
        (tmp_path / "out" / "done" / "000000.json").unlink()
        assert curated(recipe, pages, tmp_path / "out").models == report.models
        assert len(seen) == asked and contents(tmp_path / "out") == before
    assert "model answers to caption: 21" in str(report)
