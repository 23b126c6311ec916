"""Every refusal has OpenAI's form, names what is wrong, and leaves the server as it was."""

import asyncio
import base64
import json
import struct
import zlib

import httpx
import openai
import pytest

from tests.support.served import IMAGES, KEY, QUEUE, InPool

CHAT, DRAW, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
PROMPT = {"prompt": "a circle", "steps": 2}
LONG = {"prompt": "a circle", "steps": 1000, "size": "128x128"}


def image(url: str) -> dict:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}],
    }


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def url_of(blob: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(blob).decode()


JSON_CASES = {
    "size off the grid": (DRAW, {**PROMPT, "size": "60x64"}, 400, "invalid_value", "such as 64x64"),
    "size beyond the latent grid": (DRAW, {**PROMPT, "size": "144x64"}, 400, "invalid_value", "ends at 128 pixels"),
    "size in words": (DRAW, {**PROMPT, "size": "large"}, 400, "invalid_value", "WIDTHxHEIGHT"),
    "no prompt": (DRAW, {}, 400, "missing_required_parameter", "prompt=null"),
    "blank prompt": (DRAW, {"prompt": " "}, 400, "invalid_value", "prompt="),
    "prompt beyond the cache": (DRAW, {"prompt": "x" * 5000}, 400, "context_length_exceeded", "cache has 4096"),
    "answer beyond the cache": (CHAT, {**HELLO, "max_tokens": 5000}, 400, "context_length_exceeded", "cache has 4096"),
    "half a character": (DRAW, {"prompt": "\ud800"}, 400, "invalid_value", "surrogate"),
    "too many pictures": (DRAW, {**PROMPT, "n": 11}, 400, "invalid_value", "from 1 to 10"),
    "several in a stream": (DRAW, {**PROMPT, "n": 2, "stream": True}, 400, "unsupported_value", "1 with stream"),
    "true for a number": (DRAW, {**PROMPT, "n": True}, 400, "invalid_value", "an integer"),
    "a URL wanted": (DRAW, {**PROMPT, "response_format": "url"}, 400, "unsupported_value", "b64_json"),
    "unknown field": (DRAW, {**PROMPT, "stepz": 3}, 400, "unknown_parameter", "stepz"),
    "unknown preset": (DRAW, {**PROMPT, "preset": "best"}, 400, "unsupported_value", "gradio"),
    "interval reversed": (DRAW, {**PROMPT, "interval": [1, 0]}, 400, "invalid_value", "the smaller first"),
    "unknown model": (CHAT, {**HELLO, "model": "gpt-4"}, 404, "model_not_found", "expected 'tiny'"),
    "no model": (CHAT, {"messages": HELLO["messages"]}, 400, "missing_required_parameter", "model"),
    "no messages": (CHAT, {"model": "tiny", "messages": []}, 400, "invalid_value", "at least one message"),
    "unknown role": (CHAT, {"model": "tiny", "messages": [{"role": "tool"}]}, 400, "unsupported_value", "[0].role"),
    "empty message": (CHAT, {"model": "tiny", "messages": [{"role": "user"}]}, 400, "invalid_value", "or an image"),
    "tools": (CHAT, {**HELLO, "tools": [{"type": "function"}]}, 400, "unsupported_value", "tools"),
    "logprobs": (CHAT, {**HELLO, "logprobs": True}, 400, "unsupported_value", "logprobs"),
    "hot": (CHAT, {**HELLO, "temperature": 3}, 400, "invalid_value", "from 0 to 2"),
    "five stops": (CHAT, {**HELLO, "stop": list("abcde")}, 400, "invalid_value", "at most four"),
    "sound": (CHAT, {**HELLO, "modalities": ["audio"]}, 400, "unsupported_value", "modalities"),
    "remote image": (CHAT, image("http://127.0.0.1:1/a.png"), 400, "invalid_image_url", "not fetched"),
    "local file": (CHAT, image("file:///etc/passwd"), 400, "invalid_image_url", "not fetched"),
    "not base64": (CHAT, image("data:image/png;base64,@@"), 400, "invalid_base64", "base64"),
    "not an image": (CHAT, image(url_of(b"hello")), 400, "invalid_image", "input image 1"),
    "cut image": (CHAT, image(url_of(IMAGES[0][:400])), 400, "invalid_image", "image"),
    "pixel bomb": (CHAT, image(url_of(png_of(4000, 4000))), 413, "image_too_large", "16,000,000 pixels"),
}  # fmt: skip


def refused(answer: httpx.Response, status: int, code: str | None, part: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code), error
    assert part in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"}
    assert KEY not in answer.text


@pytest.mark.parametrize("name", JSON_CASES)
def test_a_wrong_field(http: httpx.Client, name: str) -> None:
    path, body, status, code, part = JSON_CASES[name]
    answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    refused(answer, status, code, part)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"n": 1e999}',
        b"\xff\xfe",
        b'{"n": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object(http: httpx.Client, body: bytes) -> None:
    answer = http.post(DRAW, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] in (
        "invalid_json",
        "missing_required_parameter",
    )


def test_forms(http: httpx.Client) -> None:
    file = {"image": ("a.png", IMAGES[0])}
    refused(http.post(EDIT, data={"prompt": "x"}, files={"other": ("a", b"x")}), 400, "unsupported_value", "other")
    refused(http.post(EDIT, data={"prompt": "x", "n": "two"}, files=file), 400, "invalid_value", 'n="two"')
    refused(http.post(EDIT, data={}, files=file), 400, "missing_required_parameter", "prompt")
    refused(http.post(EDIT, data={"prompt": "x"}, files={"image": ("a", b"GIF")}), 400, "invalid_image", "image 1")
    refused(http.post(EDIT, json={"prompt": "x"}), 415, "invalid_form", "multipart/form-data")
    many = [("image[]", ("a.png", IMAGES[0]))] * 17
    refused(http.post(EDIT, data={"prompt": "x"}, files=many), 413, "too_many_images", "at most 16")
    form = {"Content-Type": "multipart/form-data; boundary=b"}
    refused(http.post(EDIT, content=b"--b\r\ncut", headers=form), 400, "invalid_form", "cut off")


def test_bodies_beyond_the_limit(http: httpx.Client) -> None:
    kind = {"Content-Type": "application/json"}
    refused(http.post(DRAW, content=b" " * (2**20 + 1), headers=kind), 413, "request_too_large", "1,048,576 bytes")

    def chunked():
        yield from [b" " * 2**16] * 17

    refused(http.post(DRAW, content=chunked(), headers=kind), 413, "request_too_large", "1,048,576 bytes")


def test_keys_hosts_and_pages(served: InPool, http: httpx.Client) -> None:
    for wrong in ("", "Bearer", "Bearer sk-of-a-tes", f"Bearer {KEY}x", f"Basic {KEY}"):
        refused(
            httpx.get(f"{served.url}/v1/models", headers={"Authorization": wrong}), 401, "invalid_api_key", "API key"
        )
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    assert httpx.get(f"{served.url}/health").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-other").models.list()
    refused(http.get("/v1/models", headers={"Host": "["}), 403, "wrong_host", "127.0.0.1")
    sandboxed = http.post(EDIT, data={"prompt": "x"}, files={"image": ("a.png", IMAGES[0])}, headers={"Origin": "null"})
    refused(sandboxed, 403, "wrong_origin", "other web pages")
    refused(http.get("/v1/models", headers={"Host": "evil.example"}), 403, "wrong_host", "127.0.0.1")
    refused(
        http.post(DRAW, json=PROMPT, headers={"Origin": "http://evil.example"}), 403, "wrong_origin", "other web pages"
    )
    refused(
        http.post(DRAW, content=json.dumps(PROMPT), headers={"Content-Type": "text/plain"}),
        415,
        "invalid_content_type",
        "json",
    )


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    refused(http.get("/v1/embeddings"), 404, "unknown_url", "/v1/embeddings")
    refused(http.get(DRAW), 405, "unknown_url", "GET")


def test_a_client_that_leaves_frees_its_rows(http: httpx.Client) -> None:
    """The fixture checks that nothing is left."""
    with http.stream("POST", DRAW, json={**LONG, "stream": True, "partial_images": 16}) as response:
        next(response.iter_lines())
    with http.stream("POST", CHAT, json={**HELLO, "max_tokens": 2000, "stream": True}) as response:
        next(response.iter_lines())
    for path, body in ((DRAW, LONG), (CHAT, {**HELLO, "max_tokens": 2000})):
        with pytest.raises(httpx.ReadTimeout):
            http.post(path, json=body, timeout=0.3)


def test_beyond_the_queue(served: InPool, http: httpx.Client) -> None:
    """Twice as many long requests as the queue holds: half are refused at once, the others run until they are left."""

    async def all_at_once() -> list[httpx.Response | None]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, headers=headers, limits=limits, timeout=30) as many:
            tasks = [asyncio.ensure_future(many.post(DRAW, json=LONG)) for _ in range(2 * QUEUE)]
            while sum(task.done() for task in tasks) < QUEUE:
                await asyncio.sleep(0.02)
            answers = [task.result() for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return answers

    answers = asyncio.run(all_at_once())
    assert len(answers) == QUEUE
    for answer in answers:
        refused(answer, 429, "rate_limit_exceeded", f"the limit is {QUEUE}")
        assert int(answer.headers["retry-after"]) > 0
