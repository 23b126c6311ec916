"""A page with the samples of an output folder: contents, sources, and what each step did to them."""

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from megabagel.curation.measure.look import shrunk
from megabagel.curation.report import report_on
from megabagel.curation.run import done_records
from megabagel.data.decode.headers import decode
from megabagel.data.documents import Member
from megabagel.data.formats.samples import IMAGE_EXTENSIONS
from megabagel.data.formats.shards import ShardReader, list_files, split_name
from megabagel.errors import printable
from megabagel.journal import read_journal, write_whole

SIDE = 240
"""Longest side of the pictures on the page."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #202228; max-width: 1100px; margin: 2rem auto; padding: 0 2rem }
section { border-top: 1px solid #dee0e4; padding: 1rem 0 } .faint { color: #6e7480 } pre { overflow-x: auto }
img { border: 1px solid #dee0e4; display: block; margin: .5rem 0 } .text { white-space: pre-wrap }
h2 { font-size: 1rem; margin: 0 }
"""


def write_page(out: Path, page: Path, samples: int) -> None:
    """Write the page.

    Args:
        out: output folder of a run.
        page: file to write.
        samples: most samples to show; spread over the partitions.

    Raises:
        UserError: `out` is no output folder, or the page cannot be written.
    """
    records = [record for record in done_records(out) if record["samples"]]
    each = max(1, -(-samples // max(1, len(records))))
    shown = (sample for record in records for sample in _samples(out, record, each))
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{_escape(out.name)}</title><style>{STYLE}</style>',
        f"<h1>{_escape(out.name)}</h1><pre>{_escape(str(report_on(out)))}</pre>",
        *islice(shown, samples),
        "<h1>Dropped: examples by step and reason</h1>",
        *_examples(records),
        "</html>",
    ]
    write_whole(page, "\n".join(parts) + "\n")


def _samples(out: Path, record: Mapping[str, Any], most: int) -> Iterator[str]:
    about = {line["key"]: line for line in read_journal(out / "provenance" / f"{record['partition']}.jsonl")}
    for shard in record["shards"]:
        path = out / "shards" / shard["name"]
        reader = ShardReader([path])
        files, _ = list_files(path)
        for key, group in islice(groupby(files, lambda file: split_name(file.name)[0]), most):
            members = {split_name(file.name)[1]: Member(0, file.offset, file.size) for file in group}
            contents = {name: reader.read(member) for name, member in members.items()}
            yield _sample(key, about.get(key, {}), contents)
        return


def _sample(key: str, about: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    if "json" in files:
        items = json.loads(files["json"])["items"]
        body = "".join(_item(item, files) for item in items)
    else:
        body = f'<p class="text">{_escape(files.get("txt", b"").decode())}</p>'
        body += "".join(_picture(data) for name, data in files.items() if name in IMAGE_EXTENSIONS)
    notes = "".join(f"<li>{_escape(note)}</li>" for note in about.get("notes", ()))
    values = {name: value for name, value in about.items() if name not in ("key", "source", "notes")}
    head = f"<h2>{_escape(key)}</h2><p class=faint>{_escape(str(about.get('source', '')))} {_escape(str(values))}</p>"
    return f"<section>{head}<ul class=faint>{notes}</ul>{body}</section>"


def _item(item: Mapping[str, Any], files: Mapping[str, bytes]) -> str:
    role = f'<span class="faint">{_escape(item.get("role", ""))}</span>'
    if item["type"] == "text":
        return f'<p class="text">{role} {_escape(item["text"])}</p>'
    names = item["frames"] if item["type"] == "video" else [item["name"]]
    return role + "".join(_picture(files[name]) for name in names)


def _picture(data: bytes) -> str:
    small = shrunk(decode(data), SIDE)
    file = io.BytesIO()
    small.convert("RGB").save(file, "JPEG", quality=80)
    source = base64.b64encode(file.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{source}" width="{small.width}" height="{small.height}" alt="">'


def _examples(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for value in record["steps"]:
            for reason, sources in value["examples"].items():
                found.setdefault((value["step"], reason), []).extend(sources)
    for (name, reason), sources in found.items():
        listed = "".join(f"<li>{_escape(source)}</li>" for source in sources[:5])
        yield f"<h2>{_escape(name)}: {_escape(reason)}</h2><ul>{listed}</ul>"


def _escape(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))
