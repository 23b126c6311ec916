"""Ways to damage a checkpoint folder of two ranks: what disks, mix-ups and enemies do to one.

`seal` writes the manifest anew, so that what comes before it is judged by its structure and not by its checksum.
"""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabagel.checkpoint.checksums import sums_of_file
from megabagel.checkpoint.manifest import own_checksum

Damage = Callable[[Path], object]
FILES = (
    "rank_00000.safetensors",
    "rank_00001.safetensors",
    "index.json",
    "state.json",
    "config.yaml",
    "metadata.json",
    "manifest.json",
)
FIRST, SECOND = FILES[:2]
MARKER = "it-was-run"
"""File beside the checkpoint that a pickle makes when it is opened."""
KEY = "weight/layers.0.mlp.und.up.weight"
"""A tensor with a box in each file."""


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def bomb(folder: Path) -> bytes:
    return pickle.dumps(_Bomb(folder.parent / MARKER))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x10
    path.write_bytes(content)


def seal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """The manifest of what lies there now, with a `change`."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    for name in manifest["files"]:
        sums = sums_of_file(folder / name)
        manifest["files"][name] = {"size": sums.size, "blocks": list(sums.blocks)}
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps({"checksum": own_checksum(manifest), **manifest}))


def content(name: str, new: Callable[[Path], bytes], sealed: bool = True) -> Damage:
    """A file with other content."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(new(folder))
        if sealed:
            seal(folder)

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """A sealed checkpoint with a changed index."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "index.json").read_text())
        change(found)
        (folder / "index.json").write_text(json.dumps(found))
        seal(folder)

    return damage


def boxes(change: Callable[[list[Any]], object]) -> Damage:
    """The same, for the boxes of KEY: lists of file, offset, shape, start."""
    return index(lambda found: change(found[KEY]["boxes"]))


def header(change: Callable[[bytes], bytes]) -> Damage:
    """A sealed checkpoint in which the first file has another header, of the same length."""

    def damage(folder: Path) -> None:
        whole = (folder / FIRST).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        new = change(whole[8 : 8 + length])
        assert len(new) == length
        (folder / FIRST).write_bytes(whole[:8] + new + whole[8 + length :])
        seal(folder)

    return damage


def link_outside(folder: Path) -> None:
    """The right bytes, but elsewhere."""
    shutil.copyfile(folder / FIRST, folder.parent / "elsewhere")
    (folder / FIRST).unlink()
    (folder / FIRST).symlink_to(folder.parent / "elsewhere")


def list_file(name: str) -> Damage:
    """A manifest that lists a file outside."""

    def damage(folder: Path) -> None:
        (folder.parent / "secret").write_text("")
        listed = name.format(parent=folder.parent)
        seal(folder, lambda manifest: manifest["files"].update({listed: {"size": 0, "blocks": []}}))

    return damage


def swap(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def of_another(name: str) -> Damage:
    """A file of a checkpoint of the same run and grid at another step."""

    def damage(folder: Path) -> None:
        other = Path(shutil.copytree(folder, folder.parent / "other"))
        flip(other / FIRST, -5)
        flip(other / SECOND, -5)
        (other / "state.json").write_text(json.dumps({"plan": "another"}))
        seal(other, lambda manifest: manifest.update(step=7))
        shutil.copyfile(other / name, folder / name)

    return damage


def format_1(folder: Path) -> None:
    """As the first version wrote them."""
    for name in (FIRST, SECOND, "index.json"):
        (folder / name).unlink()
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        (folder / name).write_bytes(bomb(folder))
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 3, "files": {}}))


def beyond_the_end(folder: Path) -> None:
    """Index and header agree on a box whose last byte is behind the file's."""
    found = json.loads((folder / "index.json").read_text())
    whole = (folder / FIRST).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    box = found[KEY]["boxes"][0]
    name = f"{KEY}@{','.join(map(str, box[1]))}"
    start, stop = header[name]["data_offsets"]
    by = len(whole) - stop
    box[3], header[name]["data_offsets"] = start + by, [start + by, stop + by]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    (folder / "index.json").write_text(json.dumps(found))
    seal(folder)


def directory(folder: Path) -> None:
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()


def _set(found: list[Any], place: int, value: Any) -> None:
    found[0][place] = value


def edit_step(folder: Path) -> None:
    """By hand: one digit."""
    text = (folder / "manifest.json").read_text()
    assert '"step": 3' in text
    (folder / "manifest.json").write_text(text.replace('"step": 3', '"step": 4'))


def no_checksums(manifest: dict[str, Any]) -> None:
    manifest["files"][FIRST]["blocks"] = []


def every(what: str, damage: Callable[[Path], object]) -> dict[str, Damage]:
    """A damage of every kind of file."""
    return {f"{what} {name}": lambda folder, name=name: damage(folder / name) for name in FILES}


def _padded(text: bytes, length: int) -> bytes:
    return text + b" " * (length - len(text))


DAMAGES: dict[str, Damage] = {
    **every("flipped byte in", lambda path: flip(path, path.stat().st_size // 2)),
    **every("half of", lambda path: os.truncate(path, path.stat().st_size // 2)),
    **every("nothing in", lambda path: os.truncate(path, 0)),
    **every("no", Path.unlink),
    **{f"{name} of another": of_another(name) for name in (FIRST, SECOND, "state.json", "manifest.json")},
    "flipped first byte of a header": lambda folder: flip(folder / FIRST, 8),
    "flipped last byte of the numbers": lambda folder: flip(folder / SECOND, -1),
    "flipped first byte of the manifest": lambda folder: flip(folder / "manifest.json", 0),
    "ranks' files swapped": swap,
    "bytes appended": lambda folder: (folder / FIRST).write_bytes((folder / FIRST).read_bytes() + bytes(8)),
    "a folder for a file": directory,
    "a link outside": link_outside,
    "format of the future": lambda folder: seal(folder, lambda manifest: manifest.update(format=3)),
    "format 1": format_1,
    "manifest: a list": content("manifest.json", lambda folder: b"[]", sealed=False),
    "manifest: no text": content("manifest.json", lambda folder: random.Random(0).randbytes(3000), sealed=False),
    "manifest: deep": content("manifest.json", lambda folder: b"[" * 100_000, sealed=False),
    "manifest: NaN": lambda folder: seal(folder, lambda manifest: manifest.update(ema=float("nan"))),
    "manifest: huge number": lambda folder: (folder / "manifest.json").write_text('{"step": ' + "9" * 9999 + "}"),
    "manifest: step is text": lambda folder: seal(folder, lambda manifest: manifest.update(step="three")),
    "manifest: no files": lambda folder: seal(folder, lambda manifest: manifest.update(files={})),
    "manifest: no model": lambda folder: seal(folder, lambda manifest: manifest.pop("model")),
    "manifest: file above": list_file("../secret"),
    "manifest: absolute file": list_file("{parent}/secret"),
    "manifest: index not listed": lambda folder: seal(folder, lambda manifest: manifest["files"].pop("index.json")),
    "manifest: no checksums": lambda folder: seal(folder, no_checksums),
    "manifest: edited": edit_step,
    "pickle common.pt": content("common.pt", bomb, sealed=False),
    "pickle .metadata": content(".metadata", bomb, sealed=False),
    "pickle optimizer.pkl": content("optimizer.pkl", bomb, sealed=False),
    "pickle as a rank's file": content(FIRST, bomb),
    "pickle as state.json": content("state.json", bomb),
    "pickle as index.json": content("index.json", bomb),
    "pickle as metadata.json": content("metadata.json", bomb),
    "pickle as manifest.json": content("manifest.json", bomb, sealed=False),
    "state: a list": content("state.json", lambda folder: b"[1]"),
    "index: a list": content("index.json", lambda folder: b"[]"),
    "index: empty": content("index.json", lambda folder: b"{}"),
    "index: NaN": content("index.json", lambda folder: b'{"weight/x": NaN}'),
    "index: half precision": index(lambda found: found[KEY].update(dtype="F16")),
    "index: bfloat16": index(lambda found: found[KEY].update(dtype="BF16")),
    "index: no type of weights": index(lambda found: found[KEY].update(dtype="I64")),
    "index: transposed": index(lambda found: found[KEY]["shape"].reverse()),
    "index: taller": index(lambda found: found[KEY]["shape"].__setitem__(0, 10**12)),
    "index: flat": index(lambda found: found[KEY].update(shape=[7])),
    "index: no shape": index(lambda found: found[KEY].update(shape=[])),
    "index: no boxes": boxes(lambda found: found.clear()),
    "index: a box missing": boxes(lambda found: found.pop()),
    "index: a box twice": boxes(lambda found: found.append(found[0])),
    "index: boxes overlap": boxes(lambda found: _set(found, 1, found[1][1])),
    "index: a box outside": boxes(lambda found: _set(found, 1, [10**6, 0])),
    "index: a negative offset": boxes(lambda found: _set(found, 1, [-1, 0])),
    "index: sizes are text": boxes(lambda found: _set(found, 2, "ab")),
    "index: sizes are no integers": boxes(lambda found: _set(found, 2, [1.5, 2])),
    "index: huge box": boxes(lambda found: _set(found, 2, [2**62, 2**62])),
    "index: start beyond": boxes(lambda found: _set(found, 3, 2**40)),
    "index: start before": boxes(lambda found: _set(found, 3, -8)),
    "index: start shifted": boxes(lambda found: _set(found, 3, found[0][3] + 4)),
    "index: absolute file": boxes(lambda found: _set(found, 0, "/etc/passwd")),
    "index: file above": boxes(lambda found: _set(found, 0, "../secret")),
    "index: other file": boxes(lambda found: _set(found, 0, found[-1][0])),
    "index: file is a number": boxes(lambda found: _set(found, 0, 1)),
    "index: box is a number": boxes(lambda found: found.__setitem__(0, 1)),
    "header and index: beyond the end": beyond_the_end,
    "header: no JSON": header(lambda text: b"x" * len(text)),
    "header: a list": header(lambda text: _padded(b"[]", len(text))),
    "header: empty": header(lambda text: _padded(b"{}", len(text))),
    "header: another type": header(lambda text: text.replace(b'"F32"', b'"I32"')),
    "header: huge length": content(FIRST, lambda folder: b"\xff" * 8 + (folder / FIRST).read_bytes()[8:]),
    "header: cut": content(FIRST, lambda folder: (folder / FIRST).read_bytes()[:5]),
}  # fmt: skip
"""By what it is. No damaged checkpoint may be loaded, silently or at all, and nothing in it may run."""
