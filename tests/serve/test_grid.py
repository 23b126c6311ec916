"""One model on several ranks: every rank takes rank 0's requests in rank 0's order, and a lost rank ends the server."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.rank_pool import RankPool
from tests.support.served import IMAGES, publish_tiny, serving


def on_grid(folder: str) -> dict[str, Any] | int:
    """Jobs of two clients on tp = 2, one of them cancelled, beside the same calls without a server."""
    import threading

    import torch.distributed as dist

    from megabagel.data.decode.headers import decode
    from megabagel.inference.api import load_pretrained
    from megabagel.inference.load import open_source
    from megabagel.parallel import mesh
    from megabagel.runtime import cpu_backend
    from megabagel.serve.events import Failed, Finished
    from megabagel.serve.jobs import Job, Upload
    from megabagel.serve.worker import Worker

    cpu_backend.install()
    overrides = ("parallel.tp=2", "train.precision=fp32")
    config = open_source(Path(folder), None, overrides).config
    model = load_pretrained(folder, None, overrides, mesh.build(config), cache_tokens=2048)
    draw = {"n": 1, "size": (48, 32), "seed": 2, "points": 4}
    text = {"max_new_tokens": 12, "temperature": 0.9, "seed": 1}
    expected = [
        model.generate("a circle", **draw)[0].png(),
        model.tokenizer.decode(model._finish(model.submit_answer([decode(IMAGES[0]), "what?"], **text)).result),
    ]
    rank = dist.get_rank()
    worker = Worker(model, rank, 2)
    if rank:
        worker.run()
        return model.engine.cache.free_pages
    events: dict[str, list[Any]] = {"draw": [], "text": [], "left": [], "bad": [], "late": []}
    jobs = {
        "draw": Job(("a circle",), True, draw, 2),
        "left": Job(("x",), True, {**draw, "points": 900}, 0),
        "text": Job((Upload(IMAGES[0], decode(IMAGES[0])), "what?"), False, text),
        "bad": Job(("x",), True, {**draw, "size": (7, 7)}),
    }

    def clients() -> None:
        numbers = {name: worker.submit(job, events[name].append) for name, job in jobs.items()}
        while not all(isinstance((events[name] or [None])[-1], Finished | Failed) for name in ("draw", "text", "bad")):
            time.sleep(0.01)
        worker.cancel(numbers["left"])
        worker.drain(20.0)

    thread = threading.Thread(target=clients)
    thread.start()
    worker.run()
    thread.join()
    worker.submit(jobs["text"], events["late"].append)
    return {
        "draw": events["draw"][-1].result[0].png() == expected[0],
        "text": model.tokenizer.decode(events["text"][-1].result) == expected[1],
        "kinds": [type(event).__name__ for event in events["draw"]],
        "left": [type(event).__name__ for event in events["left"]],
        "bad": (events["bad"][0].error.status, events["bad"][0].error.message),
        "late": events["late"][0].error.status,
        "free": model.engine.cache.free_pages == model.engine.cache.pages,
    }


def test_every_rank_takes_the_same_requests(ranks: RankPool, tmp_path: Path) -> None:
    found, free = ranks.run(2, on_grid, str(publish_tiny(tmp_path / "tiny")), timeout=120)
    assert found["draw"] and found["text"]
    assert found["kinds"] == ["Accepted", "Preview", "Preview", "Finished"]
    assert found["left"] == ["Accepted"]
    assert found["bad"][0] == 400 and "size 7x7" in found["bad"][1]
    assert found["late"] == 503
    assert found["free"] and free == 2048 // 64


@pytest.mark.thorough
def test_a_lost_rank_ends_the_server(tmp_path: Path) -> None:
    """The launcher's code is that of the killed rank; a request under way gets an error or is cut off."""
    folder = publish_tiny(tmp_path / "tiny")
    with serving(folder, "--nproc", 2, "--set", "parallel.tp=2", "--set", "train.precision=fp32") as served:
        assert httpx.get(f"{served.url}/health", timeout=60).status_code == 200
        ranks = [p for p in psutil.Process(served.process.pid).children() if p.environ().get("RANK") == "1"]
        with (
            suppress(httpx.RemoteProtocolError),
            httpx.stream(
                "POST",
                f"{served.url}/v1/images/generations",
                json={"prompt": "x", "size": "128x128", "steps": 1000, "stream": True, "partial_images": 16},
                timeout=60,
            ) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            os.kill(ranks[0].pid, signal.SIGKILL)
            assert "the server ends" in "".join(lines)
        code = served.process.wait(60)
        assert code == 128 + signal.SIGKILL, served.process.stderr.read()
