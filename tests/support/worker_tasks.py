"""Work for worker processes: functions that a process of its own can import."""

import errno
import logging
import os
import resource
import signal
import sys
import time
from typing import Any

import torch
from megabagel_kernels.attention.mask import AttentionRanges

from megabagel.data.decode import DecodeEngine, Request
from megabagel.data.decode.host import HostEngine
from megabagel.errors import UserError


def double(task: Any) -> Any:
    """Twice the task, or whatever else it asks for."""
    match task:
        case "user error":
            raise UserError("data.sources: mend this")
        case "bug":
            return 1 // 0
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case ("sleep", seconds):
            time.sleep(seconds)
        case ("large", count):
            return torch.arange(count)
        case ("log", message):
            logging.getLogger("megabagel.data.plan.global_plan").warning("told: %s", message)
        case "pid":
            return os.getpid()
        case "open files":
            return resource.getrlimit(resource.RLIMIT_NOFILE)
        case "lambda":
            return lambda: None
        case "half pickled":
            raise Half("cannot be pickled")
        case "one way":
            raise OneWay(1, 2)
        case "exit":
            sys.exit(0)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "worn disk":
            raise UserError("shard.tar: cannot be read") from OSError(errno.EIO, os.strerror(errno.EIO))
        case "closed":
            raise PermissionError(errno.EACCES, "not yours")
        case "threads":
            return torch.get_num_threads()
    return task * 2


class Half(Exception):
    """Cannot be pickled."""

    def __reduce__(self) -> Any:
        raise TypeError("no")


class OneWay(Exception):
    """Can be pickled, and not be made anew from what that gives."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Unreadable:
    """Can be pickled, and fails where it is unpickled."""

    def __reduce__(self) -> Any:
        return _raise, ("there",)

    def __repr__(self) -> str:
        return "Unreadable()"


def _raise(text: str) -> None:
    raise ZeroDivisionError(text)


class Stumbling:
    """The host engine, which dies, fails or sleeps when it meets the picture with these bytes."""

    def __init__(self, blob: bytes, how: str) -> None:
        self.blob, self.how = blob, how

    def __call__(self, requests: list[Request]) -> Any:
        """See `DecodeEngine`."""
        if any(request.blob == self.blob for request in requests):
            if self.how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "fail":
                raise ZeroDivisionError("planted")
            time.sleep(1.5)
        return HostEngine()(requests)


ENGINE: DecodeEngine = Stumbling(b"", "fail")
"""Stumbling is an engine: for the type checker."""


def plan_codes(codes: AttentionRanges, head_dim: int) -> tuple[AttentionRanges, int]:
    """An attention plan that shows what it was made of."""
    return codes, head_dim
