"""One server for all tests of this room."""

import time
from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.support.served import KEY, InPool, serving_in_pool


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InPool]:
    """A running server with an API key and small limits."""
    with serving_in_pool(tmp_path_factory.mktemp("served")) as found:
        yield found


@pytest.fixture
def client(served: InPool) -> openai.OpenAI:
    """The official client, without its retries."""
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture
def http(served: InPool) -> Iterator[httpx.Client]:
    """A plain client with the key. Afterwards nothing may be left under way and every page of the cache be free."""
    with httpx.Client(base_url=served.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as found:
        yield found
        end = time.monotonic() + 10
        while (left := unfinished(found)) and time.monotonic() < end:
            time.sleep(0.02)
        assert not left, left


def gauges(http: httpx.Client) -> dict[str, float]:
    """Metrics without labels."""
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (line.partition(" ") for line in lines) if name[:1] != "#"}


def unfinished(http: httpx.Client) -> dict[str, float]:
    """Gauges that differ from those of an idle server."""
    found = gauges(http)
    busy = {name: found[f"megabagel_{name}"] for name in ("requests_under_way", "engine_running", "engine_waiting")}
    held = found["megabagel_cache_pages"] - found["megabagel_cache_free_pages"]
    return {name: value for name, value in {**busy, "pages held": held}.items() if value}
