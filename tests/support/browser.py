"""A headless Chromium by the WebDriver protocol, which is plain JSON over HTTP (Debian: chromium, chromium-driver)."""

import base64
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""Key of an element's id, fixed by the standard."""


@dataclass(frozen=True)
class Browser:
    """One window."""

    http: httpx.Client
    session: str

    def call(self, method: str, path: str, **body: Any) -> Any:
        """A command of the protocol."""
        answer = self.http.request(method, f"/session/{self.session}{path}", json=body if method == "POST" else None)
        value = answer.json()["value"]
        assert answer.status_code == 200, value
        return value

    def open(self, url: str) -> None:
        self.call("POST", "/url", url=url)

    def run(self, script: str, *args: Any) -> Any:
        """The value of a script that ends in `return`."""
        return self.call("POST", "/execute/sync", script=script, args=list(args))

    def type(self, selector: str, text: str) -> None:
        """Type into an element; a path into a file input."""
        self.call("POST", f"/element/{self._find(selector)}/value", text=text)

    def click(self, selector: str) -> None:
        self.call("POST", f"/element/{self._find(selector)}/click")

    def wait(self, script: str, seconds: float = 30.0) -> Any:
        """The first true value of a script."""
        end = time.monotonic() + seconds
        while not (found := self.run(script)):
            assert time.monotonic() < end, f"{script} stays false; {self.run('return document.body.innerText')}"
            time.sleep(0.05)
        return found

    def screenshot(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self.call("GET", "/screenshot"))

    def messages(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [entry["message"] for entry in self.call("POST", "/se/log", type="browser")]

    def _find(self, selector: str) -> str:
        return self.call("POST", "/element", using="css selector", value=selector)[ELEMENT]


@contextmanager
def browsing(chromedriver: str, width: int = 1180, height: int = 860) -> Iterator[Browser]:
    """A window inside the block."""
    driver = subprocess.Popen([chromedriver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in driver.stdout if "started successfully on port" in line)
        port = line.rsplit(" ", 1)[1].strip().rstrip(".")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            options = {"args": [*flags, f"--window-size={width},{height}", "--force-prefers-reduced-motion"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
            made = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            browser = Browser(http, made["sessionId"])
            yield browser
            browser.call("DELETE", "")
    finally:
        driver.kill()
        driver.wait()
