"""`megabagel data inspect`: text and drawing of one sample, given a config and the name of the sample."""

from pathlib import Path

from megabagel.config.schema import Config, SourceConfig
from megabagel.data.builders.toy_shapes import ensure_dataset
from megabagel.data.files import write_atomic
from megabagel.data.index.index import index_source
from megabagel.data.inspect.html import draw_html
from megabagel.data.inspect.page import draw_page
from megabagel.data.inspect.table import as_text
from megabagel.data.inspect.view import SampleView, view_sample
from megabagel.data.plan.global_plan import Source
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError

FORMATS = (".html", ".png")


def show(config: Config, source: str | None, sample: str, out: Path | None) -> str:
    """Describe one sample of a config as text, and optionally draw it.

    Args:
        config: the config of a run.
        source: name of an entry of `data.sources`; None takes the first.
        sample: key of the sample, or its number, from 0.
        out: file for the drawing (.html or .png), or None.

    Returns:
        The text.

    Raises:
        UserError: no such source or sample, an image cannot be decoded, or `out` cannot be written.
    """
    if out is not None and out.suffix not in FORMATS:
        raise UserError(f"--out {out}: expected a file that ends in {' or '.join(FORMATS)}.")
    entry = _entry(config, source)
    ensure_dataset(config.data)
    tokenizer = load_tokenizer(config.data.tokenizer)
    opened = Source(entry.name, entry.task, entry.weight, index_source(config.data, entry, tokenizer))
    view = view_sample(config, opened, tokenizer, sample)
    if out is not None:
        draw(view, out)
    return as_text(view)


def draw(view: SampleView, out: Path) -> None:
    """Write the page of a sample as HTML or PNG, by the suffix of `out`."""
    try:
        if out.suffix == ".html":
            write_atomic(out, draw_html(view).encode())
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            draw_page(view).save(out, optimize=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error}). Choose another path.") from error


def _entry(config: Config, name: str | None) -> SourceConfig:
    sources = {source.name: source for source in config.data.sources}
    if name is None:
        return next(iter(sources.values()))
    if name not in sources:
        raise UserError(
            f"--source {name}: the config has no source of this name. Expected one of {', '.join(sources)}."
        )
    return sources[name]
