"""The web page in a real browser: all three tabs, previews, stopping, the keyboard.

With MEGABAGEL_SCREENSHOTS=FOLDER the test leaves pictures of the page there.
"""

import os
import shutil
from pathlib import Path

import httpx
import pytest

from tests.support.browser import Browser, browsing
from tests.support.served import IMAGES, KEY, InPool

DRIVER = shutil.which("chromedriver")


def screenshot(browser: Browser, name: str) -> None:
    if folder := os.environ.get("MEGABAGEL_SCREENSHOTS"):
        Path(folder, f"{name}.png").write_bytes(browser.screenshot())


def draws(browser: Browser, http: httpx.Client) -> None:
    browser.type("#draw-prompt", "a red circle")
    for field, value in (("size", "64x48"), ("seed", "3")):
        browser.type(f"#draw-{field}", value)
    browser.run("document.querySelector('#draw-steps').value = 60")
    browser.click("#draw button.go")
    browser.wait("return document.querySelector('#draw img.partial')")
    assert browser.run("return document.querySelector('#draw progress').value") < 1
    screenshot(browser, "draw-preview")
    browser.wait("return document.querySelector('#draw img.final')")
    shown = browser.run("return document.querySelector('#draw img').src").partition(",")[2]
    body = {"prompt": "a red circle", "size": "64x48", "seed": 3, "steps": 60}
    assert shown == http.post("/v1/images/generations", json=body).json()["data"][0]["b64_json"]
    assert "64x48, seed 3" in browser.run("return document.querySelector('#draw figcaption').innerText")
    screenshot(browser, "draw")


def edits(browser: Browser, folder: Path) -> None:
    file = folder / "in.png"
    file.write_bytes(IMAGES[0])
    browser.click("#tab-edit")
    browser.type("#edit-image", str(file))
    browser.wait("return document.querySelector('#edit .thumbs img')")
    browser.type("#edit-prompt", "make it blue")
    browser.run("document.querySelector('#edit-steps').value = 12")
    browser.click("#edit button.go")
    browser.wait("return document.querySelector('#edit img.final')")
    screenshot(browser, "edit")


def asks(browser: Browser, http: httpx.Client) -> None:
    browser.click("#tab-ask")
    browser.type("#ask-text", "what is it?")
    browser.run("document.querySelector('#ask-tokens').value = 12")
    browser.click("#ask button.go")
    browser.wait("return document.querySelector('#ask .status').innerText.startsWith('done')")
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}]}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12}
    answer = http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    assert browser.run("return document.querySelector('.turn.assistant').textContent") == answer
    browser.type("#ask-text", "draw it")
    browser.run("document.querySelector('#ask-kind').value = 'image'")
    browser.click("#ask button.go")
    browser.wait("return document.querySelector('.turn.assistant img')")
    browser.wait("return document.querySelector('#ask .status').innerText.startsWith('done')")
    screenshot(browser, "ask")


def stops(browser: Browser) -> None:
    browser.click("#tab-draw")
    browser.run("document.querySelector('#draw-steps').value = 1000; document.querySelector('#draw-size').value = ''")
    browser.click("#draw button.go")
    browser.wait("return document.querySelector('#draw img.partial')")
    browser.click("#draw button.stop")
    browser.wait("return document.querySelector('#draw .status').innerText === 'stopped'")
    browser.run("document.querySelector('#draw-size').value = '7x7'")
    browser.click("#draw button.go")
    browser.wait("return document.querySelector('#draw .status.bad')?.innerText.includes('expected multiples of 16')")


@pytest.mark.thorough
@pytest.mark.skipif(DRIVER is None, reason="no chromedriver; Debian: apt-get install chromium chromium-driver")
def test_the_page(served: InPool, http: httpx.Client, tmp_path: Path) -> None:
    with browsing(DRIVER) as browser:
        browser.open(served.url)
        browser.wait("return document.querySelector('#model').innerText.includes('API key')")
        browser.type("#key", KEY)
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change'))")
        browser.wait("return document.querySelector('#model').innerText.startsWith('tiny')")
        draws(browser, http)
        edits(browser, tmp_path)
        asks(browser, http)
        browser.run("document.querySelector('#tab-ask').focus()")
        browser.type("#tab-ask", "\ue014")  # right arrow: round to the first tab
        assert browser.run("return document.activeElement.id") == "tab-draw"
        assert browser.run("return document.querySelector('#ask').hidden && !document.querySelector('#draw').hidden")
        stops(browser)
        unlabelled = (
            "return [...document.querySelectorAll('input, textarea, select')].filter(e => !e.labels.length).length"
        )
        assert browser.run(unlabelled) == 0
        messages = [text for text in browser.messages() if "401" not in text and "400" not in text]
        assert not messages, messages
