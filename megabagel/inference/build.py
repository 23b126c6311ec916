"""The model for inference on this rank: its stage of the grid, filled with weights, over a KV cache."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.names import official_name
from megabagel.checkpoint.manifest import Manifest
from megabagel.checkpoint.reader import Stored, Target
from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.inference.cache import PAGE, KVCache
from megabagel.inference.packed import pack_linears
from megabagel.inference.runner import Ranks, Runner
from megabagel.model.bagel import Bagel
from megabagel.model.factory import LayerFactory, SingleDevice
from megabagel.model.sharding import Piece, named_pieces
from megabagel.parallel.attention import AttentionEngine
from megabagel.parallel.kernels import choose_kernels
from megabagel.parallel.megatron import megatron_config, parameter_dtype
from megabagel.parallel.mesh import Mesh
from megabagel.parallel.stages import layer_split
from megabagel.runtime.device import current_device

Fill = Callable[[Bagel], None]
"""Fills the parameters of a stage."""


def build_runner(config: Config, mesh: Mesh | None, engine: AttentionEngine, fill: Fill, cache_tokens: int) -> Runner:
    """This rank's runner.

    Args:
        config: model, precision and grid; one model chunk per rank, rows never split over tensor-parallel ranks.
        mesh: the grid; None runs the whole model on one device without process groups.
        engine: attention.
        fill: weights.
        cache_tokens: rows of the KV cache, rounded up to pages.
    """
    stage = build_stage(config, mesh)
    fill(stage)
    stage.requires_grad_(False).eval()
    packed = mesh is None and pack_linears(stage)
    cache = build_cache(config, mesh.tp.size if mesh else 1, map(int, stage.layers), cache_tokens)
    ranks = Ranks(mesh.cp, mesh.pp) if mesh else None
    return Runner(config.model, stage, cache, engine, current_device(), ranks, least_rows=1 if packed else 4)


def build_cache(config: Config, tp: int, layers: Iterable[int], cache_tokens: int) -> KVCache:
    """This rank's KV cache.

    Args:
        config: model and precision.
        tp: tensor-parallel size, which divides the heads.
        layers: numbers of this rank's layers in the whole model.
        cache_tokens: rows, rounded up to pages.
    """
    model, pages = config.model, -(-cache_tokens // PAGE)
    dtype, device = parameter_dtype(config), current_device()
    return KVCache(layers, pages, model.kv_heads // tp, model.kv_channels, dtype, device)


def build_stage(config: Config, mesh: Mesh | None) -> Bagel:
    """This rank's layers, on its device, with parameters that `fill` has to set."""
    if config.parallel.vpp > 1:
        raise UserError(
            f"parallel.vpp={config.parallel.vpp}: inference has one model chunk per rank; set parallel.vpp=1"
        )
    kernels = choose_kernels(config)
    factory: LayerFactory = SingleDevice(kernels)
    pp_rank = 0
    if mesh is not None:
        from megabagel.parallel.linears import MegatronLayers

        factory, pp_rank = MegatronLayers(megatron_config(config), mesh, kernels), mesh.pp.rank
    split = layer_split(config)
    with _uninitialized(parameter_dtype(config)):
        stage = Bagel(config.model, factory, split[pp_rank], first=pp_rank == 0, last=pp_rank == len(split) - 1)
    return stage.to(current_device())


def from_published(files: TensorFiles) -> Fill:
    """Weights under their published names. Raises KeyError for one that is absent (checked before by the importer)."""

    def whole(piece: Piece) -> Tensor:
        return torch.cat(list(files.lazy(official_name(piece.name)).read()))

    def fill(stage: Bagel) -> None:
        for piece, parameter in named_pieces(stage):
            piece.view(parameter.data).copy_(piece.cut(whole(piece)))

    return fill


def from_checkpoint(stored: Stored, averaged: bool) -> Fill:
    """Weights of a checkpoint that any grid wrote: the trained ones, or the averaged ones where they were averaged."""

    def fill(stage: Bagel) -> None:
        targets = []
        for piece, parameter in named_pieces(stage):
            key = f"ema/{piece.name}" if averaged and f"ema/{piece.name}" in stored else f"weight/{piece.name}"
            if key not in stored:
                raise UserError(f"{stored.folder}: holds no tensor {key}, so it is not a checkpoint of its own model")
            targets.append(Target(key, piece.offset, piece.view(parameter.data)))
        stored.fill(targets)

    return fill


def has_average(manifest: Manifest) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return manifest.ema > 0


class _NoDraws(TorchFunctionMode):
    """Skips random initialization: it would take minutes for a 7B model, and loading overwrites all weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.uniform_, torch.Tensor.normal_):
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _uninitialized(dtype: torch.dtype) -> Iterator[None]:
    """Parameters made here have `dtype` and no initial values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _NoDraws():
            yield
    finally:
        torch.set_default_dtype(before)
