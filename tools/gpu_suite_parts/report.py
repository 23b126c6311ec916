"""The results so far, written after every item so that a run that ends early keeps what it has."""

import json
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


class Report:
    """Runs items until the time is up, remembers which kernels failed, and writes JSON and Markdown."""

    def __init__(self, path: Path, environment: dict[str, str], minutes: float) -> None:
        self.path = path
        self.environment = environment
        self.started = time.monotonic()
        self.seconds = 60 * minutes
        self.parts: dict[str, dict[str, Result]] = {}
        self.failures: list[str] = []
        self.left_out: list[str] = []
        self.broken: set[str] = set()
        self.write()

    def check(self, part: str, item: str, kernel: str, work: Callable[[], Result]) -> None:
        """Run a check, whose result says whether it is `right`; no benchmark of a kernel that failed will run."""
        result = self._run(part, item, work)
        if result and not result.get("right", False):
            self.broken.add(kernel)
            self._fail(part, item, result)

    def measure(self, part: str, item: str, kernel: str, work: Callable[[], Result], ours: bool = True) -> Result:
        """Run a benchmark; what it found, empty where it did not run. A rival may fail, `ours` may not."""
        if kernel in self.broken:
            self._keep(part, item, {"skipped": f"{kernel} gave wrong results"})
            return {}
        result = self._run(part, item, work)
        if "error" in result:
            if ours:
                self._fail(part, item, result)
            return {}
        return result

    def ceiling(self, item: str, field: str) -> float | None:
        """A measured limit of the chip; None where it was not measured."""
        return self.parts.get("ceilings", {}).get(item, {}).get(field)

    def _run(self, part: str, item: str, work: Callable[[], Result]) -> Result:
        start = time.monotonic()
        if start - self.started >= self.seconds:
            self.left_out.append(f"{part}: {item}")
            self.write()
            return {}
        try:
            result = work()
        except Exception as error:  # a result like any other: the rest of the suite still has something to say
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
        self._keep(part, item, result | {"seconds": time.monotonic() - start})
        return result

    def _fail(self, part: str, item: str, result: Result) -> None:
        self.failures.append(f"{part}: {item}: {result.get('error', 'wrong result')}")
        self.write()

    def _keep(self, part: str, item: str, result: Result) -> None:
        self.parts.setdefault(part, {})[item] = result
        print(f"{part}: {item}: {line(result)}", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, as they stand."""
        content = {
            "environment": self.environment,
            "parts": self.parts,
            "failures": self.failures,
            "left_out": self.left_out,
            "seconds": time.monotonic() - self.started,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        self.path.with_suffix(".md").write_text(self.markdown())

    def markdown(self) -> str:
        """The same as tables, one per part."""
        blocks = ["# GPU suite", "\n".join(f"- {name}: {value}" for name, value in self.environment.items())]
        blocks += [table(name, items) for name, items in self.parts.items()]
        for title, lines in (("Failures", self.failures), ("Not run, the time was up", self.left_out)):
            blocks.append(f"## {title}\n\n" + ("\n".join(f"- {entry}" for entry in lines) or "none"))
        return "\n\n".join(blocks) + "\n"


def table(title: str, items: dict[str, Result]) -> str:
    """One row per item, one column per field that any of them has."""
    columns = list(dict.fromkeys(field for result in items.values() for field in result))
    rows = [["item", *columns], ["---"] * (len(columns) + 1)]
    rows += [[item, *(cell(result.get(column, "")) for column in columns)] for item, result in items.items()]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def line(result: Result) -> str:
    """All fields on one line."""
    return ", ".join(f"{name} {cell(value)}" for name, value in result.items())


def cell(value: object) -> str:
    """A number with four digits, anything else in one line of text."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())
