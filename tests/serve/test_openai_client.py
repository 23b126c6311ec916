"""The official openai client against a running server; results equal those of the Python interface, bit for bit."""

import base64
import io
import json

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from megabagel.inference.generated import METADATA
from tests.serve.conftest import gauges
from tests.support.served import IMAGES, TEXT, InPool

URLS = ["data:image/png;base64," + base64.b64encode(image).decode() for image in IMAGES]
SAMPLED = {"max_completion_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": TEXT["seed"]}


def shown(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def said(*content: object) -> list[dict]:
    return [{"role": "user", "content": list(content) if len(content) > 1 else content[0]}]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "megabagel")
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="no such model here"):
        client.models.retrieve("gpt-4")


def test_an_answer(client: openai.OpenAI, served: InPool) -> None:
    found = client.chat.completions.create(model="tiny", messages=said("hello"), **SAMPLED)
    (choice,) = found.choices
    assert choice.message.content == served.expected["talk"]
    assert (choice.message.role, found.usage.prompt_tokens) == ("assistant", len("hello") + 2)
    assert choice.finish_reason == ("length" if found.usage.completion_tokens == 24 else "stop")
    greedy = client.chat.completions.create(model="tiny", messages=said("hello"), max_tokens=24)
    assert greedy.choices[0].message.content == served.expected["greedy"] != served.expected["talk"]


def test_a_streamed_answer_about_an_image(client: openai.OpenAI, served: InPool) -> None:
    messages = said(shown(URLS[0]), {"type": "text", "text": "what is it?"})
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=messages, stream=True, stream_options={"include_usage": True}, **SAMPLED
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == served.expected["ask"]
    assert len(chunks) > 5 and chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    usage = chunks[-1].usage
    details = usage.prompt_tokens_details.model_dump()
    assert usage.prompt_tokens == details["image_tokens"] + len("what is it?") + 2 and details["image_tokens"] > 2


def test_system_and_earlier_turns_are_part_of_the_prompt(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "be brief"}, *said("hi"), {"role": "assistant", "content": "yes"}]
    found = client.chat.completions.create(model="tiny", messages=[*messages, *said("why?")], max_tokens=1)
    assert found.usage.prompt_tokens == len("be brief" + "hi" + "yes" + "why?") + 4 * 2


def test_a_stop_text_ends_the_answer_and_is_left_out(client: openai.OpenAI, served: InPool) -> None:
    whole = served.expected["greedy"]
    stop = whole[len(whole) // 2 :][:2]
    found = client.chat.completions.create(model="tiny", messages=said("hello"), max_tokens=24, stop=[stop, "zzz"])
    assert found.choices[0].message.content == whole.partition(stop)[0]
    assert found.choices[0].finish_reason == "stop"


def test_generations(client: openai.OpenAI, served: InPool) -> None:
    found = client.images.generate(
        model="tiny", prompt="a red circle", n=2, size="64x48", extra_body={"seed": 3, "steps": 5}
    )
    assert [picture.b64_json for picture in found.data] == served.expected["draw"]
    about = json.loads(Image.open(io.BytesIO(base64.b64decode(found.data[1].b64_json))).text[METADATA])
    assert (about["seed"], about["items"], about["width"]) == (4, ["a red circle"], 64)
    assert found.usage.input_tokens == len("a red circle") + 2 and found.usage.output_tokens == 2 * 4 * 3
    again = client.images.generate(prompt="a red circle", size="64x48", extra_body={"steps": 5})
    assert again.data[0].b64_json not in served.expected["draw"], "without a seed the picture is another one"


def test_edits_of_several_images(client: openai.OpenAI, served: InPool) -> None:
    files = [("a.png", image, "image/png") for image in IMAGES]
    found = client.images.edit(model="tiny", image=files, prompt="make it blue", extra_body={"seed": 4, "steps": 4})
    assert [picture.b64_json for picture in found.data] == served.expected["edit"]


def test_partial_images_come_closer_to_the_picture(client: openai.OpenAI, served: InPool) -> None:
    events = list(
        client.images.generate(
            prompt="a red circle", size="64x48", stream=True, partial_images=3, extra_body={"seed": 3, "steps": 9}
        )
    )
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:3]] == [0, 1, 2]
    pixels = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(event.b64_json))).convert("RGB"), int) for event in events
    ]
    distance = [np.abs(partial - pixels[-1]).mean() for partial in pixels[:3]]
    assert distance[0] > distance[1] > distance[2] > 0


def test_a_picture_in_a_dialogue(http: httpx.Client, served: InPool) -> None:
    body = {"model": "tiny", "messages": said("a red circle"), "modalities": ["image"], "seed": 3, "steps": 5}
    message = http.post("/v1/chat/completions", json={**body, "size": "64x48"}).json()["choices"][0]["message"]
    url = message["images"][0]["image_url"]["url"]
    about = json.loads(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).text[METADATA])
    assert url.partition(",")[2] == served.expected["draw"][0] and about["think"] is False
    turns = [*said("a red circle"), message, *said("what is it?")]
    answer = http.post("/v1/chat/completions", json={"model": "tiny", "messages": turns, "max_tokens": 3}).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0, "the picture was shown to the model"


def test_a_thought_before_a_picture_is_streamed(http: httpx.Client) -> None:
    body = {"model": "tiny", "messages": said("a red circle"), "modalities": ["text", "image"]}
    kinds = []
    request = {**body, "max_completion_tokens": 30, "seed": 1, "steps": 2, "size": "16x16", "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=request) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                kinds += json.loads(line[6:])["choices"][0]["delta"]
    texts = kinds.index("images")
    assert kinds.count("content") > 2 and set(kinds[:texts]) == {"role", "content"} and kinds[texts:] == ["images"]


def test_metrics_and_health(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ready", "model": "tiny"}
    before = gauges(http)
    http.post("/v1/images/generations", json={"prompt": "x", "size": "16x16", "steps": 2, "n": 2})
    after = gauges(http)
    assert after["megabagel_pictures_total"] - before["megabagel_pictures_total"] == 2
    assert after["megabagel_prompt_tokens_total"] - before["megabagel_prompt_tokens_total"] == 3
    text = http.get("/metrics").text
    assert 'megabagel_requests_total{path="/v1/images/generations",status="200"}' in text
    assert text.count('le="+Inf"') == text.count("_sum{")


def test_the_page_needs_no_other_host(http: httpx.Client) -> None:
    page = http.get("/", headers={"Authorization": ""})
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text and "src=" not in page.text.replace("img-src", "")
