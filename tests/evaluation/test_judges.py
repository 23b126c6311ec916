"""Judges: an endpoint that fails in every way, the key that nobody sees, and answers recorded and replayed."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megabagel.errors import TransientFailure, UserError
from megabagel.evaluation.judges.choose import choose_judge
from megabagel.evaluation.judges.endpoint import Endpoint
from megabagel.evaluation.judges.judge import Reply
from megabagel.evaluation.judges.recorded import Recorded, Recorder
from megabagel.evaluation.suite import Request

KEY = "sk-secret-of-a-test"
Answer = tuple[int, bytes, dict[str, str]]


def said(text: str, prompt: int = 0, answer: int = 0) -> Answer:
    """A regular answer of the API."""
    usage = {"prompt_tokens": prompt, "completion_tokens": answer}
    return 200, json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode(), {}


@contextmanager
def server(respond: Callable[[int, dict[str, Any]], Answer]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A stand-in of the API: `respond(number of the request, its body)`; yields its URL and the requests."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            status, content, headers = respond(len(seen), body)
            try:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # the client gave up
                pass

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1", seen
        running.shutdown()


def endpoint(url: str, waits: list[float] | None = None, **options: Any) -> Endpoint:
    return Endpoint(url, "judge-1", sleep=(waits if waits is not None else []).append, **options)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGABAGEL_JUDGE_KEY", KEY)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


ASKED = Request("SC", ("how good?",), system="You are a judge.")


def test_the_request_and_what_it_costs(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    with server(lambda n, body: said("fine", 1000, 20)) as (url, seen):
        judge = endpoint(url, prices=(2.0, 10.0))
        reply = judge(Request("SC", ("look", tmp_path / "a.png"), "sys", 77))
    (request,) = seen
    assert reply == Reply("fine", 1000, 20, pytest.approx(0.0022)) and judge.spent == pytest.approx(0.0022)
    assert (request["path"], request["key"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("judge-1", 77, 0)
    system, user = request["messages"]
    assert system == {"role": "system", "content": "sys"} and user["content"][0] == {"type": "text", "text": "look"}
    assert user["content"][1]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")


FAILURES: list[Answer] = [
    (500, b"oops", {}),
    (429, b"slow down", {"Retry-After": "7"}),
    (200, b"{no json", {}),
    (200, b'{"choices": []}', {}),
]


def test_it_tries_again(caplog: pytest.LogCaptureFixture) -> None:
    waits: list[float] = []
    with server(lambda n, body: FAILURES[n - 1] if n <= len(FAILURES) else said("at last")) as (url, seen):
        assert endpoint(url, waits)(ASKED).text == "at last"
    assert len(seen) == 5 and waits == [1.0, 7.0, 4.0, 8.0]
    assert "status 429 (slow down)" in caplog.text and KEY not in caplog.text


def test_it_gives_up_and_keeps_the_key(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.DEBUG),
        server(lambda n, body: (503, f"key {KEY} is busy".encode(), {})) as (url, seen),
        pytest.raises(TransientFailure, match=r"no answer in 3 tries.*key \*\*\* is busy") as failure,
    ):
        endpoint(url, tries=3)(ASKED)
    assert len(seen) == 3 and KEY not in caplog.text + str(failure.value)


def test_a_refusal_ends_at_once() -> None:
    with (
        server(lambda n, body: (401, f"bad key {KEY}".encode(), {})) as (url, seen),
        pytest.raises(UserError, match=r"status 401 \(bad key \*\*\*\); set MEGABAGEL_JUDGE_KEY"),
    ):
        endpoint(url)(ASKED)
    assert len(seen) == 1


def test_time_out() -> None:
    def slow(number: int, body: dict[str, Any]) -> Answer:
        if number == 1:
            time.sleep(0.5)
        return said("now")

    with server(slow) as (url, seen):
        assert endpoint(url, timeout=0.15)(ASKED).text == "now"
    assert len(seen) == 2


def test_nobody_there() -> None:
    with pytest.raises(TransientFailure, match="no answer in 2 tries"):
        endpoint("http://127.0.0.1:9/v1", tries=2)(ASKED)


def test_rate_limit_hands_out_turns() -> None:
    waits: list[float] = []
    with server(lambda n, body: said("x")) as (url, _):
        judge = endpoint(url, waits, rate=60)
        for _ in range(3):
            judge(ASKED)
    # A second per request, and the clock moves by itself: the third waits for nearly two.
    assert len(waits) == 2 and 0 < waits[0] <= 1 < waits[1] <= 2


def test_record_and_replay(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    asked = Request("PQ", ("look", tmp_path / "a.png"))
    with server(lambda n, body: said(f"answer {n}")) as (url, seen):
        judge = Recorder(endpoint(url), tmp_path / "answers.jsonl")
        first = [judge(request).text for request in (ASKED, asked)]
    content = (tmp_path / "answers.jsonl").read_text()
    assert KEY not in content and "127.0.0.1" not in content
    (tmp_path / "a.png").rename(tmp_path / "moved.png")
    replay = Recorded(tmp_path / "answers.jsonl")
    moved = Request("PQ", ("look", tmp_path / "moved.png"))
    assert [replay(request).text for request in (ASKED, moved)] == first and len(seen) == 2
    Image.new("RGB", (2, 2), "blue").save(tmp_path / "moved.png")
    with pytest.raises(UserError, match="holds no answer to this question"):
        replay(moved)


def test_choice(tmp_path: Path) -> None:
    assert choose_judge(None, exact=True) is None
    for word, words in {
        None: "no program judges this suite",
        "endpoint:": "--judge endpoint:URL",
        "recorded:gone": "no such file",
        "detector": "no object detector comes with this program",
        "oracle:x": "expected exact, endpoint:URL",
    }.items():
        with pytest.raises(UserError, match=words):
            choose_judge(word, exact=False)
    assert choose_judge("endpoint:http://x/v1", False, "gpt", record=tmp_path / "r.jsonl").name == "endpoint gpt"  # type: ignore[union-attr]


def test_answers_on_their_way_are_kept_when_the_judge_ends(tmp_path: Path) -> None:
    """The third of five questions is refused; the others in work are recorded, and a second start asks the rest."""
    from dataclasses import replace

    from megabagel.evaluation.run import judge_outputs
    from megabagel.evaluation.suites.registry import suite_of
    from megabagel.journal import read_journal

    suite = replace(suite_of("mm-vet"), read=lambda path: [])
    items = [{"id": f"v1_{n}", "ability": "ask", "tag": "", "prompt": f"q{n}", "answer": "a"} for n in range(5)]
    lines = [json.dumps({"id": item["id"], "sample": 0, "text": "reply"}) for item in items]
    (tmp_path / "generated.0-of-1.jsonl").write_text("\n".join(lines) + "\n")

    all_asked, refused = threading.Event(), threading.Event()

    def respond(number: int, body: dict[str, Any]) -> Answer:
        if number == 5:
            all_asked.set()
        if "q2" in json.dumps(body) and not refused.is_set():
            all_asked.wait(30)
            refused.set()
            return 400, b"no", {}
        refused.wait(30)  # so the others answer after the refusal
        return said("0.5")

    with server(respond) as (url, seen):
        with pytest.raises(UserError, match="refused with status 400"):
            judge_outputs(suite, items, tmp_path, endpoint(url), suite.templates, parallel=5)
        first = {record["id"] for record in read_journal(tmp_path / "judged.jsonl")}
        assert first == {"v1_0", "v1_1", "v1_3", "v1_4"}
        judge_outputs(suite, items, tmp_path, endpoint(url), suite.templates, parallel=2)
        assert len(seen) == 6
    records = read_journal(tmp_path / "judged.jsonl")
    assert sorted(record["id"] for record in records) == sorted(item["id"] for item in items)
    assert all(record["scores"] == {"correct": 0.5} for record in records)
