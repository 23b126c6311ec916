"""A running server: the HTTP side in a thread of its own, the engine in the main thread, and the end of both."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

import uvicorn

from megabagel.errors import UserError
from megabagel.inference.api import Pipeline
from megabagel.runtime.signals import HEEDED, ignored
from megabagel.serve.app import build_app
from megabagel.serve.limits import Limits
from megabagel.serve.service import Service
from megabagel.serve.worker import Worker

API_KEY = "MEGABAGEL_API_KEY"
"""Environment variable with the key that clients have to send."""
_CLOSE_S = 2
"""Seconds for open connections to take their last answer when the server ends."""

logger = logging.getLogger(__name__)


def api_key() -> bytes | None:
    """The key of the environment. Raises UserError for an empty one, which would lock everybody out or nobody."""
    key = os.environ.get(API_KEY)
    if key is not None and not key.strip():
        raise UserError(f"{API_KEY} is set but empty: set a key, or unset it to serve without one")
    return None if key is None else os.fsencode(key)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError if the address cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)  # type: ignore[arg-type]
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); "
            "expected an address of this machine and a free port"
        ) from error


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ip_address(listener.getsockname()[0]).is_loopback


def url_of(listener: socket.socket) -> str:
    """Address of the server for a browser."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(model: Pipeline, listener: socket.socket | None, name: str, limits: Limits, drain: float, ranks: int) -> int:
    """Serve a model until SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C. Called on every rank; returns the exit code.

    Args:
        model: this rank's.
        listener: bound socket on rank 0; None elsewhere.
        name: of the model, as clients ask for it.
        limits: of requests.
        drain: seconds that running requests get to finish once the server is asked to stop.
        ranks: number of processes.

    Raises:
        KeyboardInterrupt: the end was asked for by Ctrl-C.
    """
    model.engine.most_waiting = 2 * limits.queue  # the queue's limit is kept by `guard`; cancelled ones may still wait
    if listener is None:
        with _signals_ignored():
            Worker(model, 1, ranks).run()
        return 0
    worker = Worker(model, 0, ranks)
    service = Service(worker, name, limits, api_key(), is_loopback(listener))
    if service.key is None and not service.loopback:
        logger.warning("%s is open to every machine that reaches it: set %s", url_of(listener), API_KEY)
    with _http_side(service, listener), _stop_requests(worker, drain) as asked:
        print(f"serving {name} ({service.fingerprint}) at {url_of(listener)}", flush=True)
        worker.run()
    if signal.SIGINT in asked:
        raise KeyboardInterrupt
    return 0


@contextmanager
def _http_side(service: Service, listener: socket.socket) -> Iterator[None]:
    """Run the application in a thread inside the block."""
    config = uvicorn.Config(
        build_app(service),
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            service.worker.drain(0.0)  # a server that nobody can reach ends, should this thread ever fail

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=2 * _CLOSE_S)


@contextmanager
def _stop_requests(worker: Worker, seconds: float) -> Iterator[list[int]]:
    """Drain at the first signal; the list holds those that came. A second Ctrl-C interrupts at once."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked:
            raise KeyboardInterrupt
        if not asked:
            worker.drain(seconds)
        asked.append(number)

    with _handlers(note):
        yield asked


@contextmanager
def _signals_ignored() -> Iterator[None]:
    """On ranks without clients: a signal to all ranks reaches rank 0 too, which ends the others when it has drained."""
    with _handlers(lambda _number, _frame: None):
        yield


@contextmanager
def _handlers(handler: "signal._HANDLER") -> Iterator[None]:
    numbers = [n for n in (signal.SIGINT, *HEEDED) if n != signal.SIGHUP or not ignored(n)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
