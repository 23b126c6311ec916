"""Prompts to draw: a JSONL file, a text file, the released list of T2I-CompBench, or the drawn world `scenes`.

prompts.jsonl     {"prompt": "a red circle", "id": "17", ...}    further fields are kept for the judge
prompts.txt       one prompt per line
list.json         [{"Question": "...", "Question_id": 17}, ...]
scenes:COUNT      prompts of the scenes world that are not held out for evaluation (docs/data.md)
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file
from megabagel.data.builders.scenes_text import TAGS, all_prompts
from megabagel.errors import UserError, printable
from megabagel.sequence.keys import generator

logger = logging.getLogger(__name__)

MOST_BYTES = 2**30
_SAFE = re.compile(r"[A-Za-z0-9][\w.\-]{0,99}")
NAMED = 5
"""Most repeated prompts that a message names."""


def read_prompts(source: str, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts with an `id` each, in order; a repeated prompt is left out, counted and named.

    Args:
        source: a file, or `scenes:COUNT`.
        seed: of `scenes`.

    Raises:
        UserError: the file is unusable: the message has the line; or two prompts have one id.
    """
    found: dict[str, dict[str, Any]] = {}
    texts: dict[str, str] = {}
    repeated = []
    for where, record in _records(source, seed):
        text = record.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: expected a prompt, found {text!r:.80}; remove the line or write a text")
        name = str(record["id"])
        if not _SAFE.fullmatch(name):
            raise UserError(f"{where}: id {printable(name)[:80]!r} is no file name; use letters, digits, . _ -")
        if text in texts:
            repeated.append(f"{where} repeats {texts[text]}")
            continue
        if name in found:
            raise UserError(f"{where}: id {name!r} belongs to another prompt already; give each its own")
        texts[text], found[name] = name, {**record, "id": name}
    if repeated:
        shown = "; ".join(repeated[:NAMED])
        logger.warning("prompts left out because they are there already: %d (%s)", len(repeated), shown)
    if not found:
        raise UserError(f"{source}: holds no prompt")
    return list(found.values())


def _records(source: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, record with an id) of every entry."""
    world, _, count = source.partition(":")
    if world == "scenes" and count:
        if not count.isdecimal() or int(count) < 1:
            raise UserError(f"{source}: expected scenes:COUNT with a number above 0")
        yield from ((source, record) for record in _scenes(int(count), seed))
        return
    path = Path(source)
    try:
        text = read_file(path, MOST_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read ({error}); expected a file of prompts or scenes:COUNT") from error
    if path.suffix == ".json":
        yield from _released(source, text)
        return
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{source}: line {number}"
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield where, {"prompt": line.strip(), "id": f"{number:06d}"}
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: no JSON ({error}); mend or remove it") from error
        if not isinstance(record, dict):
            raise UserError(f'{where}: expected {{"prompt": "..."}}, found {line:.80}')
        yield where, {"id": f"{number:06d}", **record}


def _released(source: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: no JSON ({error})") from error
    if not isinstance(entries, list):
        raise UserError(f"{source}: expected a list of prompts")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or "Question" not in entry:
            raise UserError(f'{source}: entry {number}: expected {{"Question": ..., "Question_id": ...}}')
        yield f"{source}: entry {number}", {"prompt": entry["Question"], "id": str(entry.get("Question_id", number))}


def _scenes(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Prompts of all tags in turn, none held out, each once; fewer than `count` where the world has no more."""
    streams = []
    for tag in TAGS:
        kept = [prompt for prompt in all_prompts(tag) if not prompt.held_out]
        streams.append([kept[i] for i in generator(seed, "posttrain prompts", tag).permutation(len(kept))])
    number = turn = 0
    while number < count and turn < max(map(len, streams)):
        for stream in streams:
            if turn < len(stream) and number < count:
                yield {**stream[turn].to_json(), "id": f"{number:06d}"}
                number += 1
        turn += 1
