"""The latent cache: VAE moments of every training image, computed once instead of in every step.

The codec (the frozen VAE) is applied ahead of training. The cache holds its moments (mean and log variance of the
posterior, or the single point of a deterministic codec) rather than latents, so that training still samples latents
from the posterior. Images are looked up by the digest of their file and their training size, not by shard or sample:
the cache stays valid with other tokenizers, tasks and shards, and an image that is in two sources is stored once.

    OUT/manifest.json                  what the cache is valid for
    OUT/latents-000000.safetensors     "<digest>-<height>x<width>": [C, height / downsample, width / downsample]
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from megabagel.config.reading import read_file
from megabagel.config.schema import Config
from megabagel.config.typed_json import Bounds, Positive, WrongValue, parse, read_as
from megabagel.data.decode import DecodeEngine, Request
from megabagel.data.documents import ImageItem, SampleError
from megabagel.data.files import write_atomic
from megabagel.data.plan.expand import Expander
from megabagel.data.plan.global_plan import Source
from megabagel.errors import UserError, printable
from megabagel.locks import inside, locked

logger = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 28
"""Tensor bytes after which a shard is written."""
BATCH = 32
"""Images per call of the decode engine."""

Precision = Literal["fp32", "bf16"]
TYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class LatentCache:
    """Reader of cached moments. Picklable: each worker process has a copy.

    `channels`: channels of the moments. `shards`: file name by image name, about 150 bytes per image.
    """

    folder: Path
    channels: int
    shards: Mapping[str, str]

    def read(self, blob: bytes, height: int, width: int) -> Tensor:
        """Moments of an image file, float32 [C, h, w].

        Args:
            blob: bytes of the image file.
            height: training height in pixels.
            width: training width in pixels.

        Raises:
            SampleError: not in the cache: the image could not be decoded, or its file has changed since.
        """
        name = image_name(blob, height, width)
        if name not in self.shards:
            raise SampleError("not in the latent cache", name)
        return _open(self.folder / self.shards[name]).get_tensor(name).float()


@dataclass(frozen=True)
class Report:
    """Image counts of one call of `write_latents`."""

    written: int
    known: int
    """Already in the cache: from an earlier run, or as an image of another sample."""
    lost: int
    """Missing, changed or not decodable; training cannot use them either."""

    def __str__(self) -> str:
        return f"images written: {self.written}, in the cache already: {self.known}, lost: {self.lost}"


def image_name(blob: bytes, height: int, width: int) -> str:
    """Name of an image in the cache: digest of its file and training size in pixels."""
    return f"{hashlib.blake2b(blob, digest_size=16).hexdigest()}-{height}x{width}"


def open_latents(folder: Path, config: Config, sources: Sequence[Source], codec: str) -> LatentCache:
    """Open a latent cache for a training run.

    Args:
        folder: folder of the cache (`data.latents`).
        config: its VAE sizes must be those of the cache.
        sources: sources of the run; those with VAE images must be covered by the cache.
        codec: fingerprint of the run's codec.

    Raises:
        UserError: there is no cache, it belongs to another codec or other sizes, or it lacks a source.
    """
    manifest = _manifest(folder)
    if manifest is None:
        raise UserError(
            f"data.latents={folder}: no {MANIFEST} there; `megabagel data latents CONFIG {folder}` writes it"
        )
    _check(folder, manifest, _validity(config, codec))
    absent = [source.name for source in _with_latents(sources) if source.index.fingerprint not in manifest["sources"]]
    if absent:
        raise UserError(
            f"data.latents={folder}: nothing is known of {', '.join(absent)} as data.sources has it now. "
            f"`megabagel data latents CONFIG {folder}` adds the images that are missing."
        )
    shards = _names(folder)
    logger.info("latent cache: %s (%s, %d images)", folder, manifest["precision"], len(shards))
    return LatentCache(folder, manifest["channels"], shards)


def write_latents(
    config: Config,
    sources: Sequence[Source],
    folder: Path,
    decode: DecodeEngine,
    moments: Callable[[Tensor], Tensor],
    codec: tuple[str, int],
    precision: Precision,
) -> Report:
    """Write the moments of all training images that are not in the cache yet. An interrupted call can be repeated.

    Args:
        config: resize rule and patch sizes.
        sources: sources whose images are encoded; tasks without VAE images are skipped.
        folder: folder of the cache; created if absent.
        decode: engine that decodes image files.
        moments: the codec: [1, 3, height, width] in [-1, 1] -> float32 [1, C, h, w].
        codec: fingerprint of the codec, and C, the channels of its moments.
        precision: bf16 halves the cache and rounds every moment to 8 significant bits.

    Raises:
        UserError: the folder holds a cache of another codec, size or precision; another process writes to it; or it
            cannot be written.
    """
    with locked(inside(folder), str(folder)):
        return _write_latents(config, sources, folder, decode, moments, codec, precision)


def _write_latents(
    config: Config,
    sources: Sequence[Source],
    folder: Path,
    decode: DecodeEngine,
    moments: Callable[[Tensor], Tensor],
    codec: tuple[str, int],
    precision: Precision,
) -> Report:
    validity = _validity(config, codec[0])
    manifest = _manifest(folder) or {**validity, "precision": precision, "channels": codec[1], "sources": []}
    _check(folder, manifest, {**validity, "precision": precision})
    try:
        # Written before the shards, so that shards of an interrupted run have a manifest to be checked against; written
        # again after them with the sources, because a source counts as covered only when all its images are there.
        _write_manifest(folder, manifest)
        report = _fill(config, sources, folder, decode, moments, TYPES[precision])
        known = {*manifest["sources"], *(source.index.fingerprint for source in _with_latents(sources))}
        _write_manifest(folder, {**manifest, "sources": sorted(known)})
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); choose a folder with space and rights") from error
    return report


def _fill(
    config: Config,
    sources: Sequence[Source],
    folder: Path,
    decode: DecodeEngine,
    moments: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
) -> Report:
    names = set(_names(folder))
    shard: dict[str, Tensor] = {}
    written = known = lost = 0
    images = _images(config, sources)
    while batch := list(islice(images, BATCH)):
        new = {}
        for read, size in batch:
            try:
                blob = read()
            except SampleError:
                lost += 1
                continue
            name = image_name(blob, *size)
            known += name in names
            if name not in names:
                # Added before decoding: the same image in two samples of one batch is encoded once.
                names.add(name)
                new[name] = Request(blob, (size,))
        for name, outcome in zip(new, decode(list(new.values())), strict=True):
            if isinstance(outcome, SampleError):
                lost += 1
                continue
            shard[name] = moments(outcome[0][None])[0].to("cpu", dtype)
            written += 1
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            _write_shard(folder, shard)
            shard = {}
    if shard:
        _write_shard(folder, shard)
    return Report(written, known, lost)


def _images(config: Config, sources: Sequence[Source]) -> Iterator[tuple[Callable[[], bytes], tuple[int, int]]]:
    """(function that reads the file, training height and width) of every image that training may encode.

    Every frame and alternative of a document is included, whichever of them a visit selects.
    """
    expander = Expander.of(config)
    for source in _with_latents(sources):
        for number in range(len(source.index.documents)):
            for item in source.index.documents[number].items:
                if isinstance(item, ImageItem) and item.role != "look":
                    yield partial(source.index.image, item), expander.vae_size(item)


def _with_latents(sources: Sequence[Source]) -> list[Source]:
    """Sources with images that the codec encodes."""
    return [source for source in sources if source.task not in ("i2t", "text")]


def _validity(config: Config, codec: str) -> dict[str, Any]:
    """Settings on which moments depend, apart from the image files."""
    return {
        "format": FORMAT,
        "codec": codec,
        "data.vae_resize": asdict(config.data.vae_resize),
        "stride": config.model.latent_stride,
    }


def _check(folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name, value in wanted.items():
        if (found := manifest.get(name)) != value:
            raise UserError(
                f"{folder}: a latent cache with {name} = {printable(str(found))[:90]}, but {value} is wanted. Write "
                "another one with `megabagel data latents CONFIG OUT` into a folder of its own."
            )


@dataclass(frozen=True)
class _Written:
    """Fields of a manifest, except `data.vae_resize`."""

    format: int
    codec: str
    stride: Positive
    precision: Literal["fp32", "bf16"]
    channels: Annotated[int, Bounds(1, 2**16)]
    sources: tuple[str, ...]


_MOST_MANIFEST = 2**24


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    try:
        content = parse(read_file(path, _MOST_MANIFEST))
        read_as(_Written, content)
        return content  # type: ignore[no-any-return]
    except FileNotFoundError:
        return None
    except (OSError, WrongValue) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove the folder and write the cache again") from error


def _write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    write_atomic(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def _write_shard(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    # One more than the last number, not the count: a user may have removed a damaged shard in the middle.
    shards = _shards(folder)
    number = int(shards[-1].stem.removeprefix("latents-")) + 1 if shards else 0
    write_atomic(folder / f"latents-{number:06d}.safetensors", save({n: t.contiguous() for n, t in tensors.items()}))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"latents-{'[0-9]' * 6}.safetensors"))


def _names(folder: Path) -> dict[str, str]:
    """File name of the shard of every image, by image name."""
    return {name: path.name for path in _shards(folder) for name in _open(path).keys()}  # noqa: SIM118


# Bounds the number of open files per process.
@lru_cache(maxsize=256)
def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it and run `megabagel data latents` again"
        ) from error
