"""Logs of a job of many ranks: what is alike on all of them is logged once.

Rank 0 logs from INFO on; the others log warnings of their own. A warning that every rank would give in the same words
is marked where it is given:

    logger.warning("not resuming from %s: %s", folder, error, extra=RANK0)
"""

import logging

from megabagel.errors import printable

RANK0 = {"rank0": True}
"""`extra` of a line that all ranks have alike; rank 0 logs it for them."""


class PrintableFormatter(logging.Formatter):
    """Escapes what could command a terminal: names and texts in records come from foreign files."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, with line breaks and tabs kept."""
        return printable(super().format(record), keep="\n\t")


class _Format(PrintableFormatter):
    """Level in front of warnings and errors, and the rank, except that of rank 0."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        """One line, as `Formatter.format` does, and a traceback where there is one."""
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{self._rank}{level}{super().format(record)}"


def configure_log(rank: int) -> None:
    """Log to stderr as rank `rank` of a job does."""
    level = logging.WARNING if rank else logging.INFO
    logging.getLogger("megabagel").setLevel(level)
    handler = logging.StreamHandler()
    handler.setFormatter(_Format(rank))
    handler.addFilter(lambda record: rank == 0 or not hasattr(record, "rank0"))
    logging.basicConfig(level=level, handlers=[handler])  # nothing where the program has handlers already
