"""Folders that are complete or absent, and the small files in a published one."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megabagel.config.reading import read_file
from megabagel.config.typed_json import WrongValue, parse
from megabagel.errors import UserError, no_space
from megabagel.locks import beside, locked

LLM_CONFIG, VIT_CONFIG, VAE_WEIGHTS = "llm_config.json", "vit_config.json", "ae.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "added_tokens.json")
MOST_JSON = 2**28
"""Bytes of a JSON file: the longest are tokenizers, with some tens of megabytes."""
_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth")


@contextmanager
def new_folder(final: Path, size: int) -> Iterator[Path]:
    """A folder under a temporary name, to be filled with up to `size` bytes; at the end it gets its name.

    Whatever goes wrong, nothing is left behind. Raises UserError if `final` exists or the disk refuses.
    """
    with locked(beside(final), str(final)), _new_folder(final, size) as partial:
        yield partial


@contextmanager
def _new_folder(final: Path, size: int) -> Iterator[Path]:
    if final.exists():
        raise UserError(f"{final}: exists already; expected a new folder. Name another one, or remove it.")
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < size:
            raise no_space(f"it takes {size >> 20:,} MiB, {free >> 20:,} MiB are free")
        yield partial
        partial.rename(final)
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written ({error}). Make room or mend permissions, or name a folder elsewhere."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def assets(folder: Path) -> dict[str, Path]:
    """Files of a published folder beside its weights, by name: configs, tokenizer, autoencoder."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and (path.name == VAE_WEIGHTS or not path.name.endswith(_WEIGHTS))
    }


def copy_into(folder: Path, files: Mapping[str, Path]) -> None:
    """Copy files, or what links stand for, under the given names into a folder that is made if need be."""
    folder.mkdir(exist_ok=True)
    for name, file in files.items():
        shutil.copyfile(file, folder / name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when there is none."""
    try:
        content = parse(read_file(path, MOST_JSON))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected a JSON file of the model") from error
    except WrongValue as error:
        raise UserError(f"{path}: no JSON ({error}). Copy the file again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, expected a JSON object. Copy the file again.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(content, indent=2) + "\n")
