"""Work for worker processes: functions that a process of its own can import."""

import logging
import os
import resource
import signal
import time
from typing import Any

import torch
from megabagel_kernels.attention.mask import AttentionCodes

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
        case "threads":
            return torch.get_num_threads()
    return task * 2


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


def plan_codes(codes: AttentionCodes, head_dim: int) -> tuple[AttentionCodes, int]:
    """An attention plan that shows what it was made of."""
    return codes, head_dim
