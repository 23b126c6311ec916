"""One-time creation of a synthetic data set; a marker file, written last, holds its parameters."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megabagel.data.files import staging, write_atomic
from megabagel.errors import UserError

logger = logging.getLogger(__name__)


def write_once(marker: Path, what: str, wanted: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Create a data set in the folder of `marker`, unless it exists already.

    Args:
        marker: file in the folder of the data set that holds the parameters of a complete one.
        what: name of the data set in messages ("shape").
        wanted: parameters, as JSON values; an existing data set with others is refused.
        write: writes all files into the (staging) folder that it is given.

    Raises:
        UserError: the folder holds the data set with other parameters, or cannot be read or written.
    """
    root = marker.parent
    try:
        found = json.loads(marker.read_bytes()) if marker.is_file() else None
        if found is None:
            logger.info("writing the %s data set into %s: %s", what, root, wanted)
            with staging(root) as stage:
                write(stage)
            # After all other files: without a marker the data set counts as incomplete and is written again.
            write_atomic(marker, json.dumps(wanted).encode())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{root}: the {what} data set cannot be written or read ({error}). Make room, choose another data.root, or"
            " remove the folder."
        ) from error
    if found not in (None, wanted):
        raise UserError(
            f"{marker}: the {what} data set there has {found}, expected {wanted}. Remove the folder or choose another"
            " data.root."
        )
