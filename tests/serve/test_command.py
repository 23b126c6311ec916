"""The command: what it needs, what it refuses before the model is loaded, how it ends."""

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from megabagel import cli
from megabagel.errors import USER_ERROR, UserError
from tests.support.served import publish_tiny, serving


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setattr("megabagel.commands.serve.find_spec", lambda name: None if name == "uvicorn" else object())
    assert cli.main(["serve", str(tmp_path)]) == USER_ERROR
    assert (
        "uvicorn not installed; they are the extra `serve`: pip install 'megabagel[serve]'" in capsys.readouterr().err
    )


def test_an_address_in_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(tmp_path), "--port", str(port)]) == USER_ERROR
    assert f"--port {port}: cannot listen there" in capsys.readouterr().err


def test_an_empty_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from megabagel.serve.server import api_key

    monkeypatch.setenv("MEGABAGEL_API_KEY", " ")
    with pytest.raises(UserError, match="MEGABAGEL_API_KEY is set but empty"):
        api_key()


@pytest.mark.parametrize("words", [["--port", "70000"], ["--queue", "0"], ["--drain", "-1"], ["--max-body", "x"]])
def test_options_without_meaning(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "x", *words])
    assert ended.value.code == USER_ERROR and words[0] in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_drains(tmp_path: Path) -> None:
    """A running request is finished, a new one refused, and the process ends with 0."""
    with serving(publish_tiny(tmp_path / "tiny"), "--set", "train.precision=fp32", "--name", "it") as served:
        assert served.name == "it"
        found: list[Any] = []
        body = {"prompt": "x", "size": "64x64", "steps": 300}
        running = threading.Thread(
            target=lambda: found.append(httpx.post(f"{served.url}/v1/images/generations", json=body, timeout=60))
        )
        running.start()
        while "megabagel_engine_running 1" not in httpx.get(f"{served.url}/metrics").text:
            time.sleep(0.02)
        served.process.send_signal(signal.SIGTERM)
        while httpx.get(f"{served.url}/health").status_code == 200:
            time.sleep(0.02)
        refused = httpx.post(f"{served.url}/v1/images/generations", json=body)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "server_stopping"
        running.join()
        assert found[0].status_code == 200
        assert served.process.wait(30) == 0
