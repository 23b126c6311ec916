"""The judge that a command names: `exact`, `endpoint:URL`, `model:CKPT`, `recorded:FILE` or `detector`."""

from pathlib import Path

from megabagel.errors import UserError
from megabagel.evaluation.judges.endpoint import Endpoint
from megabagel.evaluation.judges.judge import Judge
from megabagel.evaluation.judges.recorded import Recorded, Recorder


def choose_judge(
    word: str | None,
    exact: bool,
    model: str = "",
    timeout: float = 120.0,
    rate: float = 0.0,
    prices: tuple[float, float] = (0.0, 0.0),
    record: Path | None = None,
) -> Judge | None:
    """Return a judge; None for the suite's own program.

    Args:
        word: KIND:PLACE; None: the suite's program.
        exact: whether the suite has one.
        model: name of the endpoint's model.
        timeout: seconds per request to an endpoint.
        rate: most requests to an endpoint per minute; 0: no limit.
        prices: of a million tokens of questions and answers.
        record: file to which answers are written too.

    Raises:
        UserError: there is no such judge.
    """
    kind, _, place = (word or "exact").partition(":")
    found: Judge
    match kind:
        case "exact":
            if not exact:
                raise UserError(
                    "no program judges this suite; expected --judge endpoint:URL, model:CKPT or recorded:FILE"
                )
            return None
        case "endpoint":
            if not place or not model:
                raise UserError(
                    "--judge endpoint:URL: expected an address such as https://HOST/v1 and --judge-model NAME"
                )
            found = Endpoint(place, model, timeout, rate=rate, prices=prices)
        case "model":
            from megabagel.evaluation.judges.own import Own
            from megabagel.inference.api import load_pretrained

            found = Own(load_pretrained(Path(place)))
        case "recorded":
            found = Recorded(Path(place))
        case "detector":
            raise UserError(
                "--judge detector: no object detector comes with this program. Run one of your choice and give its "
                "boxes as --judge recorded:FILE (docs/evaluation.md#geneval says which form)"
            )
        case _:
            raise UserError(f"--judge {word}: expected exact, endpoint:URL, model:CKPT or recorded:FILE")
    return Recorder(found, record) if record else found
