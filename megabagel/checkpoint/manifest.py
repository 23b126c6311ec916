"""Manifest of a checkpoint: its description, and size and checksums of every file.

    step_00000100/rank_00000.safetensors   slices of tensors, one file per rank that owns any (reader.py, index.py)
    step_00000100/index.json               which slice of which tensor lies in which file
    step_00000100/state.json               data plan and other JSON state
    step_00000100/config.yaml              resolved config of the run
    step_00000100/metadata.json            name of the format, for megatron-core's dist_checkpointing
    step_00000100/manifest.json            step, grid, model, versions; size and checksums of every file; written last

No file is ever unpickled: all are JSON, YAML or safetensors, and a folder that contains a pickle is refused by name.
"""

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from megabagel.checkpoint.checksums import ANOTHER, BLOCK, SummedReader, Sums, checksum, sums_of_file
from megabagel.config.ranges import out_of_range
from megabagel.config.reading import read_file
from megabagel.config.schema import Config, ModelConfig
from megabagel.config.typed import Problems, build
from megabagel.config.typed_json import Bounds, Count, Share, WrongValue, is_file_name, parse, read_as
from megabagel.errors import UserError

FORMAT = 2
BACKEND = "megabagel"
MANIFEST, STATE, INDEX, CONFIG, METADATA = (
    "manifest.json",
    "state.json",
    "index.json",
    "config.yaml",
    "metadata.json",
)
KEYS = 1
"""Version of the derivation of random keys from a seed (sequence/keys.py): a seed gives the same random numbers only
within one version."""
_MOST_JSON = 2**30
_PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".distcp", ".ckpt")


@dataclass(frozen=True)
class Manifest:
    """Description of a checkpoint."""

    step: int
    """Finished steps; 0 for imported weights."""
    grid: dict[str, int]
    """Sizes of the axes tp, pp, vpp, cp and dp that wrote it; empty for imported weights."""
    ema: float
    """`train.ema` of the run; 0 means no averaged weights."""
    freeze: tuple[str, ...]
    """`train.freeze` of the run; frozen weights have neither moments nor averages."""
    seed: int | None
    """`train.seed` of the run; None for imported weights."""
    keys: int
    """`KEYS` when it was written."""
    model: dict[str, Any]
    """Model config by dotted key."""
    versions: dict[str, str]
    """Versions of this package, its commit and its libraries."""
    files: dict[str, Sums]
    """Every other file, by path inside the folder."""
    after: str | None = None
    """`identity` of what `latest` named when this was written; None in older files and imports."""


def write_manifest(folder: Path, model: ModelConfig, sums: dict[str, Sums], **about: Any) -> None:
    """Complete a checkpoint folder: flush its files and list them in the manifest.

    Args:
        folder: with all files in place.
        model: config of the model.
        sums: checksums known from writing; other files are read.
        about: step, grid, ema and other fields of `Manifest`.

    Raises:
        OSError: a file cannot be read, flushed or written.
    """
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name not in sums:
            flush(path)
        files[name] = sums.get(name) or sums_of_file(path)
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        flush(path)
    content = {
        "format": FORMAT,
        "seed": None,
        "keys": KEYS,
        **about,
        "model": asdict(model),
        "versions": versions(),
        "files": {name: asdict(sum) for name, sum in files.items()},
    }
    replace_file(folder / MANIFEST, json.dumps({"checksum": own_checksum(content), **content}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest, and check that all listed files exist with their size. Contents are checked when they are read.

    Raises:
        UserError: the folder is not a complete checkpoint of this format.
    """
    refuse_pickles(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: no complete checkpoint there (expected {MANIFEST} in it). Name a folder such as "
            "RUN/checkpoints/step_00000100."
        )
    content = parse_json(folder / MANIFEST, _text(folder / MANIFEST))
    written = content.get("format") if isinstance(content, dict) else None
    if type(written) is int and written != FORMAT:
        raise UserError(f"{folder}: checkpoint format {written}, this version reads {FORMAT}. {ANOTHER}")
    try:
        found = read_as(_Written, content)
        _check_written(found)
    except WrongValue as error:
        raise UserError(f"{folder / MANIFEST}: no manifest of a checkpoint ({error}). {ANOTHER}") from error
    expected = content.pop("checksum")
    if expected != own_checksum(content):
        raise UserError(f"{folder / MANIFEST}: was changed: it does not fit its own checksum. {ANOTHER}")
    for name, sums in found.files.items():
        _check_there(folder, name, sums.size)
    manifest = Manifest(
        found.step,
        found.grid,
        found.ema,
        found.freeze,
        found.seed,
        found.keys,
        leaves(asdict(ModelConfig())) | leaves(found.model),  # fields that are younger than the file
        found.versions,
        found.files,
        found.after,
    )
    model_of(folder, manifest)
    return manifest


def identity(folder: Path) -> str:
    """The checksum of a checkpoint's manifest, empty without one: equal for equal checkpoints, not for equal names."""
    try:
        return read_as(_Identity, parse(read_file(folder / MANIFEST, _MOST_JSON))).checksum
    except (OSError, WrongValue):
        return ""


@dataclass(frozen=True)
class _Identity:
    checksum: str


AXES = ("tp", "pp", "vpp", "cp", "dp")
_MOST_RANKS = 2**20
_RANKS_PER_FILE = 1024
"""Upper bound of ranks per file written: few ranks hold nothing of the model."""


@dataclass(frozen=True)
class _Written:
    """Schema of the manifest file."""

    format: Literal[2]
    checksum: str
    step: Count
    grid: dict[str, Annotated[int, Bounds(1, _MOST_RANKS)]]
    ema: Share
    freeze: tuple[Literal["llm", "vit", "connector", "latent", "und"], ...]
    seed: int | None
    keys: Count
    model: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, Sums]
    after: str | None = None


def _check_written(found: _Written) -> None:
    """Raise WrongValue for fields that contradict each other."""
    if found.grid and sorted(found.grid) != sorted(AXES):
        raise WrongValue(f"grid has the axes {ascii(sorted(found.grid))[:80]}; expected {', '.join(AXES)}, or none")
    wrote = sum(name.startswith("rank_") for name in found.files)
    if found.grid and prod(found.grid.values()) // found.grid["vpp"] > min(_MOST_RANKS, _RANKS_PER_FILE * wrote):
        raise WrongValue(f"grid {found.grid} is of more ranks than can have written {wrote} files")
    if found.ema == 1:
        raise WrongValue("ema is 1; expected a share below 1")
    for name, sums in found.files.items():
        if not is_file_name(name):
            raise WrongValue(f"files names {ascii(name)[:80]}; expected files inside the folder")
        if sums.size < 0 or len(sums.blocks) != -(-sums.size // BLOCK):
            raise WrongValue(f"{name} has {len(sums.blocks)} checksums for {sums.size} bytes")


def model_of(folder: Path, manifest: Manifest) -> ModelConfig:
    """Return the checkpoint's model config. Raises UserError if this version does not understand it."""
    tree: dict[str, Any] = {}
    for key, value in manifest.model.items():
        *above, name = key.split(".")
        node = tree
        for part in above:
            # Where the file has a section in place of a number, the section wins and is refused below.
            if not isinstance(node.get(part), dict):
                node[part] = {}
            node = node[part]
        node[name] = list(value) if isinstance(value, tuple) else value
    problems = Problems()
    model = build(ModelConfig, tree, problems, "model")
    lines = [text for _, text in problems.found]
    lines = lines or [line for key, line in out_of_range(Config(model=model)) if key.startswith("model.")]
    if lines:
        raise UserError("\n  ".join((f"{folder}: its model is not understood", *lines[:20])))
    return model


def refuse_pickles(folder: Path) -> None:
    """Raise UserError if a file of the folder is a pickle by its name, as in older formats."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.exists() and not path.is_file() and not path.is_dir():
            raise UserError(f"{path}: neither a file nor a folder; expected a checkpoint of files. Remove it.")
        if path.name == ".metadata" or path.suffix in _PICKLES:
            raise UserError(
                f"{path}: a pickle, which can run any code when it is opened, so this version opens none; expected a "
                f"checkpoint of format {FORMAT}. If the folder is a checkpoint of format 1, write it as published "
                "weights with the version that made it (megabagel export-hf) and import those (megabagel import-hf); "
                "else remove the file."
            )


def read_json(folder: Path, name: str, manifest: Manifest) -> Any:
    """Read a JSON file of a checkpoint after comparing its checksum. Raises UserError."""
    sums = manifest.files.get(name)
    if sums is None:
        raise UserError(f"{folder / MANIFEST}: lists no {name}, which every checkpoint has. {ANOTHER}")
    reader = SummedReader(folder / name, sums)
    try:
        return parse_json(folder / name, reader.read(0, sums.size))
    finally:
        reader.close()


def parse_json(path: Path, content: bytes) -> Any:
    """Parse strict JSON, without NaN and infinities. Raises UserError."""
    try:
        return parse(content)
    except WrongValue as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). {ANOTHER}") from error


def _text(path: Path) -> bytes:
    try:
        return read_file(path, _MOST_JSON)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {ANOTHER}") from error


def _check_there(folder: Path, name: str, size: int) -> None:
    """Raise UserError unless a listed file is inside the folder and has its size."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{folder / MANIFEST}: lists {name!r}, expected files inside the folder. {ANOTHER}")
    # A symbolic link could point to any file of the machine.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: a link to {path.resolve()}, expected a file inside the folder. {ANOTHER}")
    there = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
    if there != f"{size} bytes":
        raise UserError(f"{path}: {there}, expected {size} bytes by {MANIFEST}. {ANOTHER}")


def leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of a nested mapping by dotted key."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= leaves(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found


def own_checksum(content: dict[str, Any]) -> str:
    """Checksum of a manifest over everything except this checksum."""
    return checksum(json.dumps(content, sort_keys=True).encode())


def replace_file(path: Path, text: str) -> None:
    """Write a small file atomically: after a crash it is either the old or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """fsync a file's content, or a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@lru_cache
def versions() -> dict[str, str]:
    """Return the versions of package, commit, torch, megatron-core and numpy."""
    found = {name: version(name) for name in ("torch", "megatron-core", "numpy")}
    try:
        found["megabagel"] = version("megabagel")
    except PackageNotFoundError:
        found["megabagel"] = "checkout"
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            found["commit"] = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout[
                :-1
            ]
        except (OSError, subprocess.SubprocessError):
            found["commit"] = "unknown"
    return found
