"""Counters in Prometheus's text format, version 0.0.4.

By hand: the format of counters, gauges and one kind of histogram is a dozen lines, and the client library brings a
global registry that outlives a server in one process. All methods but `text` run on the event loop's thread.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the latency histograms, seconds."""


class Histogram:
    """Latencies by upper bound."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKETS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one latency."""
        self._counts[bisect_left(BUCKETS, seconds)] += 1
        self._sum += seconds

    def lines(self, name: str, labels: str) -> list[str]:
        """Its lines; counts are cumulative."""
        found, total = [], 0
        for bound, count in zip([*(f"{b:g}" for b in BUCKETS), "+Inf"], self._counts, strict=True):
            total += count
            found.append(f'{name}_bucket{{{labels},le="{bound}"}} {total}')
        return [*found, f"{name}_sum{{{labels}}} {self._sum:.6f}", f"{name}_count{{{labels}}} {total}"]


class Metrics:
    """Counters since the start of the server."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status; 499: the client left."""
        self.seconds: dict[str, Histogram] = {}
        """Time to the end of the answer, by path."""
        self.first: dict[str, Histogram] = {}
        """Time to the first token or partial image, by path."""
        self.totals: Counter[str] = Counter()

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests[path, status] += 1
        self.seconds.setdefault(path, Histogram()).observe(seconds)

    def began(self, path: str, seconds: float) -> None:
        """Count the first token or partial image of an answer."""
        self.first.setdefault(path, Histogram()).observe(seconds)

    def text(self, gauges: Mapping[str, tuple[str, float]]) -> str:
        """All metrics.

        Args:
            gauges: help text and current value by name without prefix.
        """
        lines = [*_head("requests_total", "counter", "Answers by path and HTTP status (499: the client left).")]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'megabagel_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, help_text, table in (
            ("request_seconds", "Time to the end of an answer.", self.seconds),
            ("first_event_seconds", "Time to the first token or partial image.", self.first),
        ):
            lines += _head(name, "histogram", help_text)
            for path, histogram in sorted(table.items()):
                lines += histogram.lines(f"megabagel_{name}", f'path="{path}"')
        for name, help_text in TOTALS.items():
            lines += [*_head(f"{name}_total", "counter", help_text), f"megabagel_{name}_total {self.totals[name]}"]
        for name, (help_text, value) in gauges.items():
            lines += [*_head(name, "gauge", help_text), f"megabagel_{name} {value:g}"]
        return "\n".join(lines) + "\n"


TOTALS = {
    "prompt_tokens": "Tokens of accepted prompts, delimiters included.",
    "generated_tokens": "Decoded tokens, thoughts included.",
    "pictures": "Finished pictures.",
}


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP megabagel_{name} {help_text}", f"# TYPE megabagel_{name} {kind}"]
