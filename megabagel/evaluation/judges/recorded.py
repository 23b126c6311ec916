"""Recorded answers: a judge that repeats what another one said, and the recorder that makes such files.

A line is {"request": digest of the question, "criterion": ..., "answer": text}: no image, no address, no key.
"""

import threading
from pathlib import Path

from megabagel.errors import UserError
from megabagel.evaluation.judges.judge import Judge, Reply, request_digest
from megabagel.evaluation.suite import Request
from megabagel.journal import Journal, read_journal


class Recorded:
    """Answers from a file, by the digest of the question."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"--judge recorded:{path}: no such file; expected answers written by --record")
        self.path = path
        self._answers: dict[str, str] = {}
        for number, record in enumerate(read_journal(path), 1):
            if not isinstance(record.get("request"), str) or not isinstance(record.get("answer"), str):
                raise UserError(f"{path}, line {number}: expected the texts `request` and `answer`")
            self._answers[record["request"]] = record["answer"]

    @property
    def name(self) -> str:
        """Kind and file name."""
        return f"recorded {self.path.name}"

    def __call__(self, request: Request) -> Reply:
        """Look up the answer. Raises UserError if the question was never asked."""
        digest = request_digest(request)
        if digest not in self._answers:
            raise UserError(
                f"{self.path}: holds no answer to this question ({request.criterion}, {digest}); the pictures or the "
                "questions differ from those that were recorded"
            )
        return Reply(self._answers[digest])


class Recorder:
    """A judge whose answers are also written to a file."""

    def __init__(self, judge: Judge, path: Path) -> None:
        self._judge, self._journal, self._lock = judge, Journal(path), threading.Lock()

    @property
    def name(self) -> str:
        """That of the judge."""
        return self._judge.name

    def __call__(self, request: Request) -> Reply:
        """Ask the judge and record its answer."""
        reply = self._judge(request)
        with self._lock:
            self._journal.append({
                "request": request_digest(request), "criterion": request.criterion, "answer": reply.text
            })  # fmt: skip
        return reply
