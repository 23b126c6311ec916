"""All suites by name."""

from megabagel.errors import UserError
from megabagel.evaluation.suite import Suite
from megabagel.evaluation.suites.editing import GEDIT, IMGEDIT, INTELLIGENT, KRIS
from megabagel.evaluation.suites.geneval import GENEVAL
from megabagel.evaluation.suites.rise import RISE
from megabagel.evaluation.suites.shapes import SHAPES
from megabagel.evaluation.suites.t2i import COMPBENCH, REASONBENCH, WISE
from megabagel.evaluation.suites.understanding import MATHVISTA, MMBENCH, MME, MMMU, MMVET, MMVP

_ALL = (
    *(SHAPES, GENEVAL, WISE, COMPBENCH, REASONBENCH),
    *(GEDIT, IMGEDIT, KRIS, RISE, INTELLIGENT),
    *(MME, MMBENCH, MMMU, MMVET, MATHVISTA, MMVP),
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _ALL}


def suite_of(name: str) -> Suite:
    """A suite by name. Raises UserError for an unknown one."""
    if name not in SUITES:
        raise UserError(f"suite {name!r}: expected one of {', '.join(SUITES)}")
    return SUITES[name]
