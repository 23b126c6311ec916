"""200 mixed requests at once, some of which are left half-way: none is lost, none has other bits than alone."""

import asyncio
import base64
import json
import time
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.serve.conftest import unfinished
from tests.support.served import IMAGES, KEY, InPool

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
ROUND, AT_ONCE, GROWTH_MIB = 100, 16, 24


def saying(*content: dict, **more: Any) -> dict[str, Any]:
    return {"json": {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **more}}


TEXT = {"type": "text", "text": "what is it?"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(IMAGES[0]).decode()}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (CHAT, saying(TEXT, max_tokens=8)),
    "sampled": (CHAT, saying(TEXT, max_tokens=12, temperature=0.9, seed=3)),
    "seen": (CHAT, saying(IMAGE, TEXT, max_tokens=5, temperature=0.5, seed=4)),
    "draw": (DRAW, {"json": {"prompt": "a circle", "size": "48x48", "steps": 4, "seed": 1}}),
    "two": (DRAW, {"json": {"prompt": "a square", "size": "32x48", "steps": 3, "seed": 8, "n": 2}}),
    "edit": (EDIT, {"data": {"prompt": "bluer", "steps": "3", "seed": "2"}, "files": {"image": ("a.png", IMAGES[0])}}),
    "in a dialogue": (CHAT, saying(IMAGE, TEXT, modalities=["image"], steps=3, seed=5, size="32x32")),
}
NAMES = list(KINDS)


def content(answer: httpx.Response) -> Any:
    """What of an answer depends on the request alone."""
    assert answer.status_code == 200, answer.text
    found = answer.json()
    return found["data"] if "data" in found else (found["choices"], found["usage"])


async def one(client: httpx.AsyncClient, number: int, alone: dict[str, Any], seconds: list[float]) -> str:
    """Request `number`: every fifth is left after a while."""
    path, body = KINDS[NAMES[number % len(NAMES)]]
    began = time.monotonic()
    if number % 5 == 3:
        try:
            await asyncio.wait_for(client.post(path, **body), 0.01 * (number % 7))
        except (TimeoutError, asyncio.TimeoutError):
            return "left"
        return "done"
    assert content(await client.post(path, **body)) == alone[NAMES[number % len(NAMES)]], NAMES[number % len(NAMES)]
    seconds.append(time.monotonic() - began)
    return "done"


async def rounds(served: InPool, alone: dict[str, Any]) -> dict[str, Any]:
    seconds: list[float] = []
    memory = psutil.Process(served.pid).memory_info
    async with httpx.AsyncClient(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        room = asyncio.Semaphore(AT_ONCE)

        async def in_turn(number: int) -> str:
            async with room:
                return await one(client, number, alone, seconds)

        ends = await asyncio.gather(*map(in_turn, range(ROUND)))
        before = memory().rss
        ends += await asyncio.gather(*map(in_turn, range(ROUND, 2 * ROUND)))
        return {"ends": ends, "seconds": seconds, "growth": (memory().rss - before) / 2**20}


@pytest.mark.slow
def test_two_hundred_requests(served: InPool, http: httpx.Client) -> None:
    alone = {name: content(http.post(path, **body)) for name, (path, body) in KINDS.items()}
    assert len({json.dumps(found) for found in alone.values()}) == len(KINDS)
    found = asyncio.run(rounds(served, alone))
    left = found["ends"].count("left")
    assert len(found["ends"]) == 2 * ROUND and left >= 20 and len(found["seconds"]) == 2 * ROUND - 40
    end = time.monotonic() + 10
    while unfinished(http) and time.monotonic() < end:
        time.sleep(0.02)
    assert not unfinished(http)
    assert found["growth"] < GROWTH_MIB, f"{found['growth']:.1f} MiB more after the second hundred"
    p50, p95 = np.percentile(found["seconds"], [50, 95])
    print(f"latency of {len(found['seconds'])} requests, {AT_ONCE} at once: p50 {p50:.2f} s, p95 {p95:.2f} s; "
          f"{left} left; memory {found['growth']:+.1f} MiB")  # fmt: skip
