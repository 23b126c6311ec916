"""Limits of what one request may ask for, and of how many may be under way."""

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Limits of the server. Tokens are limited by the KV cache: a request that could never fit is refused."""

    body: int = 32 * MIB
    """Bytes of a request's body."""
    pixels: int = 2**24
    """Pixels of all input images of a request, checked in their headers before anything is decoded."""
    queue: int = 64
    """Requests that are under way, waiting ones included; more are answered 429 before their body is read."""
    images: int = 16
    """Input images of a request."""
    pictures: int = 10
    """`n` of one request."""
    steps: int = 1000
    """Grid points of a picture."""
    previews: int = 16
    """Partial images of one picture: each costs a pass of the autoencoder's decoder."""
    seconds: float = 60.0
    """Seconds for a client to send its body."""
