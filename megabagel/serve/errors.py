"""Errors of the HTTP API in the form of OpenAI's: a status, and a JSON body with message, type, param and code."""

from typing import Any

from megabagel.errors import UserError, printable
from megabagel.inference.engine import QueueFull, RequestTooLarge

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_AFTER_S = 1
"""Seconds after which a refused client may try again."""


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: value found, expectation and next step.
        code: machine-readable reason, as in the OpenAI API where it has one.
        param: the field that is wrong, if it is one field.
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(self.message, keep="\n")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers beside the body."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}


def of_user_error(error: UserError) -> ApiError:
    """The answer to a request that the model refuses."""
    if isinstance(error, RequestTooLarge):
        return ApiError(400, str(error), "context_length_exceeded")
    if isinstance(error, QueueFull):
        return queue_full(str(error))
    return ApiError(400, str(error), "invalid_value")


def queue_full(message: str) -> ApiError:
    """The answer to a request beyond the queue's limit."""
    return ApiError(429, message, "rate_limit_exceeded")


def stopping() -> ApiError:
    """The answer while the server ends."""
    return ApiError(503, "the server is stopping: send the request again, to its successor", "server_stopping")
