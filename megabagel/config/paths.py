"""Check of paths for `~` and `$NAME`, which are not expanded in a config."""

import re
from collections.abc import Iterator

from megabagel.config.rules import value_at
from megabagel.config.schema import Config

PATHS = (
    *("run.dir", "run.resume", "run.init_from", "model.vae.path"),
    *("data.root", "data.index_dir", "data.tokenizer", "data.latents"),
)


def unexpanded(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, message) of every path that begins with `~` or contains `$NAME`."""
    # A shell does not expand `run.dir=~/runs`, and nothing in a YAML file. Without this check the run would create a
    # folder named ~ or $SCRATCH.
    paths = [(key, value_at(config, key)) for key in PATHS]
    for listed in ("sources", "val_sources"):
        for i, source in enumerate(getattr(config.data, listed)):
            paths += [(f"data.{listed}.{i}.{field}", getattr(source, field)) for field in ("path", "images")]
    for key, path in paths:
        if path and re.match(r"~[^/]*(/|$)", path):
            yield key, f"{key} = {path!r}: ~ is not replaced here; write the home folder out (or ./~ for such a name)"
        elif path and (name := re.search(r"\$(\w+|\{\w+\})", path)):
            yield key, f"{key} = {path!r}: {name[0]} is not replaced here; write its value"
