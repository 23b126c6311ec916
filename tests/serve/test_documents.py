"""Examples of docs/serving.md, run against a server."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.pictures import file_of, noise
from tests.support.served import KEY, InPool

TEXT = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def example(mark: str) -> str:
    """The code block after a mark, for the test's model."""
    code = re.search(rf"<!-- {mark} -->\n```\w+\n(.*?)```", TEXT, re.S)[1]
    return code.replace('"demo"', '"tiny"')


def ran(served: InPool, folder: Path, *command: str) -> str:
    env = {**os.environ, "URL": served.url, "KEY": KEY}
    found = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_curl(served: InPool, tmp_path: Path) -> None:
    (tmp_path / "circle.png").write_bytes(file_of(noise(48, 48)))
    script = example("curl").replace("curl $URL", "curl -sS --fail-with-body $URL")
    found = ran(served, tmp_path, "bash", "-e", "-c", script)
    assert found.count('"b64_json":') == 2 and found.count('"chat.completion"') == 1


def test_openai_client(served: InPool, tmp_path: Path) -> None:
    found = ran(served, tmp_path, sys.executable, "-c", example("openai"))
    assert found.endswith("image_generation.partial_image\n" * 3 + "image_generation.completed\n")
    assert (tmp_path / "circle.png").read_bytes().startswith(b"\x89PNG")
