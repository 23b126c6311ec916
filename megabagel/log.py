"""Logging of a job with many ranks: a line that is the same on all ranks appears once.

Rank 0 logs from INFO on, the other ranks from WARNING on. A warning that every rank would log with the same text is
marked where it is logged:

    logger.warning("not resuming from %s: %s", folder, error, extra=RANK0)
"""

import logging

from megabagel.errors import printable

RANK0 = {"rank0": True}
"""`extra` of a line that is equal on all ranks; only rank 0 logs it."""


class PrintableFormatter(logging.Formatter):
    """Formatter that escapes terminal control characters: records contain names and texts of foreign files."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record; line breaks and tabs are kept."""
        return printable(super().format(record), keep="\n\t")


class _Format(PrintableFormatter):
    """Formatter with the level before warnings and errors, and the rank before lines of ranks other than 0."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, with its traceback if there is one."""
        level = f"{record.levelname} " if record.levelno >= logging.WARNING else ""
        return f"{self._rank}{level}{super().format(record)}"


def configure_log(rank: int) -> None:
    """Log to stderr as rank `rank` of a job."""
    level = logging.WARNING if rank else logging.INFO
    logging.getLogger("megabagel").setLevel(level)
    handler = logging.StreamHandler()
    handler.setFormatter(_Format(rank))
    handler.addFilter(lambda record: rank == 0 or not hasattr(record, "rank0"))
    # basicConfig does nothing if the program has configured handlers: a caller's logging stays as it is.
    logging.basicConfig(level=level, handlers=[handler])
