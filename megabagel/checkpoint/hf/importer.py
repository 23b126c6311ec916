"""Import of published weights as a checkpoint that any grid loads: every tensor is used once, every weight filled once.

It starts from the targets: each tensor of the whole model has one origin, read piece by piece in its own type. No
tensor is held as a whole, and no value is rounded.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from pathlib import Path

import torch

from megabagel.checkpoint import lazy
from megabagel.checkpoint.hf.deduce import deduce
from megabagel.checkpoint.hf.files import INDEX_SUFFIX, TensorFiles
from megabagel.checkpoint.hf.folder import VAE_WEIGHTS, assets, copy_into, new_folder
from megabagel.checkpoint.hf.names import LATENT_TABLE, official_name, official_shapes, table_sides
from megabagel.checkpoint.hf.tokens import check_tokenizer
from megabagel.checkpoint.hf.vae import vae_config
from megabagel.checkpoint.index import TYPES
from megabagel.checkpoint.lazy import LazyTensor
from megabagel.checkpoint.manifest import STATE, write_manifest
from megabagel.config.load import to_dict, write_yaml
from megabagel.config.schema import ModelConfig, VaeConfig
from megabagel.errors import UserError
from megabagel.model.positions import sincos_table
from megabagel.model.shapes_only import model_shapes

ASSETS, MODEL = "official", "model.yaml"
"""In an imported checkpoint: the files beside the weights, kept for export, and the model as a config file."""
WEIGHTS = ("ema", "model")
"""Names that a file or index of weights may have, best first."""
TABLE_TYPES = "tables"
"""Key in the checkpoint's JSON state: type of each position table in the file, as the tables are not stored."""
_ROOM = 64 << 20  # bytes beside the numbers of all tensors
_LISTED = 40


@dataclass(frozen=True)
class Summary:
    """Result of an import or export."""

    out: Path
    tensors: int
    parameters: int
    bytes: int
    """Of the numbers of all tensors."""
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{self.tensors:,} tensors, {self.parameters:,} parameters, {self.bytes:,} bytes"
        return "\n".join((f"{self.out}: {counts}, {self.seconds:.1f} s", *self.notes))


def import_folder(source: Path, out: Path) -> Summary:
    """Import a folder laid out as the published BAGEL-7B-MoT (docs/bagel.md#published-folder) as checkpoint `out`.

    `out` also gets `model.yaml`, a config file for runs with this model, and a copy of all that is not weights.
    Raises UserError.
    """
    files = find_weights(source)
    kept = assets(source)
    vae = vae_config(kept[VAE_WEIGHTS]) if VAE_WEIGHTS in kept else VaeConfig()
    model = deduce(source, files.shapes, vae)
    check_tokenizer(source, model.vocab)

    def add(folder: Path) -> None:
        copy_into(folder / ASSETS, kept)
        write_model(folder, out, model)

    return import_tensors(files, model, out, add)


def find_weights(folder: Path) -> TensorFiles:
    """The weights in a published folder, one file or sharded. Raises UserError when there are none."""
    for name in WEIGHTS:
        for path in (folder / f"{name}.safetensors", folder / f"{name}{INDEX_SUFFIX}"):
            if path.is_file():
                return TensorFiles(path)
    raise UserError(
        f"{folder}: no weights there; expected ema.safetensors, model.safetensors or one of them with "
        f"{INDEX_SUFFIX} and its shards. Name the folder of a BAGEL checkpoint."
    )


def import_tensors(
    files: TensorFiles, model: ModelConfig, out: Path, add: Callable[[Path], None] = lambda folder: None
) -> Summary:
    """Import the tensors of published weights as checkpoint `out`.

    Args:
        files: the published weights.
        model: config that the weights must fit.
        out: new folder.
        add: writes more files into the folder before it is completed.

    Raises:
        UserError: one message with every tensor that is missing, unexpected, or of another shape or type, or a position
            table with other values.
    """
    began = time.monotonic()
    check_tensors(files, official_shapes(model), model)
    check_tables(files, model)
    tensors = {name: files.lazy(official_name(name)) for name in model_shapes(model)}
    tables = {name: files.type(name) for name in table_sides(model)}
    write_checkpoint(out, model, tensors, tables, add)
    return summary(out, {name: files.lazy(name) for name in files.names}, began)


def summary(out: Path, tensors: Mapping[str, LazyTensor], began: float, notes: tuple[str, ...] = ()) -> Summary:
    """Return the summary of an import or export.

    Args:
        out: folder written.
        tensors: all tensors written.
        began: start on the monotonic clock, seconds.
        notes: further lines for the user.
    """
    parameters = sum(prod(tensor.shape) for tensor in tensors.values())
    size = sum(tensor.nbytes for tensor in tensors.values())
    return Summary(out, len(tensors), parameters, size, time.monotonic() - began, notes)


def write_checkpoint(
    out: Path,
    model: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    tables: Mapping[str, str],
    add: Callable[[Path], None],
) -> None:
    """Write the weights of a whole model as a complete checkpoint of step 0.

    Args:
        out: new folder.
        model: config of the model.
        tensors: by this package's names.
        tables: safetensors type of each frozen position table, kept for export.
        add: writes more files into the folder before it is completed.
    """
    with new_folder(out, sum(tensor.nbytes for tensor in tensors.values()) + _ROOM) as folder:
        (folder / STATE).write_text(json.dumps({TABLE_TYPES: tables}))
        add(folder)
        sums = lazy.write(folder, {f"weight/{name}": tensor for name, tensor in tensors.items()})
        write_manifest(folder, model, sums, step=0, grid={}, ema=0.0, freeze=())


def write_model(folder: Path, out: Path, model: ModelConfig) -> None:
    """`model.yaml`: the section `model` of a run that starts from the checkpoint that will be `out`."""
    section = to_dict(model)
    if (folder / ASSETS / VAE_WEIGHTS).is_file():
        section["vae"]["path"] = str(out.absolute() / ASSETS / VAE_WEIGHTS)
    write_yaml({"model": section}, folder / MODEL)


def check_tensors(
    files: TensorFiles, expected: Mapping[str, tuple[int, ...]], model: ModelConfig | None = None
) -> None:
    """Raise UserError, listing names, unless the files hold exactly the `expected` tensors, in types of weights."""
    lines = []
    for name in sorted(expected.keys() | set(files.names)):
        if name not in files:
            lines.append(f"{name}: missing, expected {list(expected[name])}")
        elif name not in expected:
            lines.append(f"{name}: unexpected, {list(files.shape(name))} in {files.where(name)}")
        elif files.shape(name) != expected[name]:
            found = f"{name}: {list(files.shape(name))} in {files.where(name)}, expected {list(expected[name])}"
            lines.append(found + (_other_grid(files.shape(name), model) if name == LATENT_TABLE and model else ""))
        elif files.type(name) not in TYPES:
            lines.append(f"{name}: type {files.type(name)} in {files.where(name)}, expected one of {', '.join(TYPES)}")
    if lines:
        count = "1 tensor does" if len(lines) == 1 else f"{len(lines)} tensors do"
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"... and {len(lines) - _LISTED} more"]
        raise UserError(
            "\n  ".join((f"{files.path}: {count} not fit the model", *lines))
            + "\nCheck that weights and config files belong together and were copied whole."
        )


def _other_grid(shape: tuple[int, ...], model: ModelConfig) -> str:
    """Return a hint about the grid that a latent table of another size belongs to."""
    side = isqrt(shape[0])
    if side * side != shape[0]:
        return ""
    return f" (a table of max_latent_size {side}: model.latent_grid = {side}, not {model.latent_grid})"


def check_tables(files: TensorFiles, model: ModelConfig) -> None:
    """Raise UserError unless the frozen position tables hold the numbers that the model computes for itself."""
    for name, side in table_sides(model).items():
        computed, row = sincos_table(model.hidden, side), 0
        for piece in files.lazy(name).read():
            off = (piece.double() - computed[row : row + len(piece)]).abs()
            if not bool((off <= torch.finfo(piece.dtype).eps).all()):  # a NaN is no number of the table either
                worst = int(off.amax(1).nan_to_num(torch.inf).argmax())
                raise UserError(
                    f"{files.where(name)}: tensor {name}: row {row + worst} is {float(off[worst].max()):.3g} off the "
                    "2-D sin-cos table that BAGEL freezes (first half: column, second: row), expected equal numbers. "
                    "Its weights were trained with other positions, so they cannot be used."
                )
            row += len(piece)


def fresh(make: Callable[[], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> LazyTensor:
    """A tensor that is made rather than read."""

    def pieces() -> Iterator[torch.Tensor]:
        whole = make().to(dtype)
        return (whole[start:stop] for start, stop in lazy.row_ranges(shape, dtype))

    return LazyTensor(shape, dtype, pieces)
