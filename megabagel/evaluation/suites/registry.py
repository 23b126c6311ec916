"""All suites by name."""

from megabagel.errors import UserError
from megabagel.evaluation.suite import Suite
from megabagel.evaluation.suites.shapes import SHAPES

SUITES: dict[str, Suite] = {suite.name: suite for suite in (SHAPES,)}


def suite_of(name: str) -> Suite:
    """A suite by name. Raises UserError for an unknown one."""
    if name not in SUITES:
        raise UserError(f"suite {name!r}: expected one of {', '.join(SUITES)}")
    return SUITES[name]
