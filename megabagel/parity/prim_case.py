"""A `prim_*` case: building blocks one by one, without a model."""

import io
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from megabagel_kernels.attention.mask import dense_mask
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megabagel.config.schema import ResizeConfig, VaeConfig
from megabagel.data.decode.contract import DecodeError, Request
from megabagel.data.decode.host import decode_image
from megabagel.data.decode.transforms import resize_target
from megabagel.errors import UserError
from megabagel.model.flow import timestep, timestep_features
from megabagel.model.positions import apply_rope, rope_tables, sincos_table
from megabagel.model.vae_flux import FluxCodec, load_autoencoder
from megabagel.parity.case import Case
from megabagel.parity.comparisons import Gates, Row, compare
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.items import Mode
from megabagel.sequence.pack import mask_codes
from megabagel.sequence.patches import patchify
from megabagel.sequence.sample import Segment

ROPE_BASE = 1e6
MODES = {"causal": Mode.CAUSAL, "full": Mode.FULL, "noise": Mode.NOISE}
NOT_OURS = ("packing", "len2weight")
"""Records of the official packer, which loses samples, and of a loss weighting that its trainer leaves off."""

Entries = dict[str, Tensor]
Result = tuple[Tensor, bool]
"""This project's value of an entry, and whether it must be exact."""


def compare_blocks(case: Case, gates: Gates) -> list[Row]:
    """Compare every entry of the case. Raises UserError for one that is not known."""
    if "vae" in case.about:
        return list(_autoencoder_rows(case, gates))
    unknown = case.groups - GROUPS.keys()
    if unknown:
        raise UserError(f"{case.path}: entries {', '.join(sorted(unknown))}/...: expected {', '.join(GROUPS)}")
    entries = {f"{group}/{name}": x for group in GROUPS for name, x in case.tensors(group).items()}
    rows = []
    for name, theirs in entries.items():
        group, _, rest = name.partition("/")
        found = GROUPS[group](rest, entries, case.about)
        if found is not None:
            ours, exact = found
            rows.append(compare(name, ours, theirs, gates.exact if exact else gates.block))
    return [*rows, *_resize_rows(case, gates)]


def left_out(case: Case) -> list[str]:
    """Entries of the JSON file that record what we do otherwise on purpose."""
    return [key for key in case.about if key.startswith(NOT_OURS)]


def _mask(name: str, entries: Entries, about: dict[str, Any]) -> Result:
    layout = about["masks"][int(name)]
    segments = iter(Segment(MODES[m], n) for m, n in zip(layout["attn_modes"], layout["split_lens"], strict=True))
    samples: list[list[Segment]] = []
    for length in layout["sample_lens"]:
        samples.append([])
        while sum(segment.length for segment in samples[-1]) < length:
            samples[-1].append(next(segments))
    return torch.from_numpy(dense_mask(mask_codes(samples))), True


def _position_ids(name: str, entries: Entries, about: dict[str, Any]) -> Result:
    number, _, mode = name.partition(".")
    image = about["position_ids"][int(number)]
    rows, cols = image["height"] // image["patch"], image["width"] // image["patch"]
    return torch.from_numpy(grid_ids(rows, cols, image["max_per_side"], mode == "interpolate")), True


def _sincos(name: str, entries: Entries, about: dict[str, Any]) -> Result:
    dim, side, *rows = re.findall(r"\d+|rows", name)
    table = sincos_table(int(dim), int(side))
    return (table[about["sincos_rows"]] if rows else table), False


def _timestep(name: str, entries: Entries, about: dict[str, Any]) -> Result | None:
    if name.startswith("shifted_"):
        return timestep(entries["timestep/raw"], float(name.removeprefix("shifted_"))), False
    if name.startswith("embedding"):
        return timestep_features(entries["timestep/t"]), False
    return None  # inputs


def _rope(name: str, entries: Entries, about: dict[str, Any]) -> Result | None:
    if name.startswith(("cos_", "sin_")):
        both = rope_tables(entries["rope/positions"], int(name[4:]), ROPE_BASE)
        return both[name.startswith("sin_")], False
    if name.startswith("q_out_pos"):
        q_TNH = entries["rope/q_in"]
        positions_T = torch.tensor([int(p) for p in name.removeprefix("q_out_pos").split("_")])
        return apply_rope(q_TNH, *rope_tables(positions_T, q_TNH.shape[-1], ROPE_BASE)), False
    return None


def _patches(name: str, entries: Entries, about: dict[str, Any]) -> Result | None:
    return (patchify(entries["patchify/pixels"], 14), True) if name == "tokens" else None


def _latent(name: str, entries: Entries, about: dict[str, Any]) -> Result | None:
    size = re.fullmatch(r"tokens_h(\d+)_w(\d+)", name)
    if size is None:
        return None
    rows, cols = (2 * int(side) for side in size.groups())
    return patchify(entries["latent/latent"][:, :rows, :cols], 2), True


def _transform(name: str, entries: Entries, about: dict[str, Any]) -> Result | None:
    sizes = re.fullmatch(r"out_max(\d+)_min(\d+)_stride(\d+)", name)
    if sizes is None:
        return None
    most, least, stride = map(int, sizes.groups())
    picture, blob = Image.fromarray(entries["transform/pixels_hwc_uint8"].numpy()), io.BytesIO()
    picture.save(blob, "PNG")
    width, height = resize_target(*picture.size, ResizeConfig(most, least), stride)
    views = decode_image(Request(blob.getvalue(), ((height, width),)))
    assert not isinstance(views, DecodeError), "a PNG of our own"
    return views[0], False


GROUPS: dict[str, Callable[[str, Entries, dict[str, Any]], Result | None]] = {
    "mask": _mask,
    "posids": _position_ids,
    "sincos": _sincos,
    "timestep": _timestep,
    "rope": _rope,
    "patchify": _patches,
    "latent": _latent,
    "transform": _transform,
}
"""How each group of entries is computed by us; None for an entry that is an input."""


def _resize_rows(case: Case, gates: Gates) -> Iterator[Row]:
    """Sizes that images are brought to."""
    for name, rule in case.about.get("resize", {}).get("configs", {}).items():
        resize = ResizeConfig(rule["max_size"], rule["min_size"], rule["max_pixels"])
        ours = [resize_target(width, height, resize, rule["stride"], n) for width, height, n, *_ in rule["cases"]]
        yield compare(f"resize/{name}", torch.tensor(ours), torch.tensor([c[3:] for c in rule["cases"]]), gates.exact)


def _autoencoder_rows(case: Case, gates: Gates) -> Iterator[Row]:
    """The FLUX autoencoder at the case's size: posterior, sample with the case's noise, pixels."""
    entries, codec = case.tensors("vae"), case_autoencoder(case)
    moments = codec.moments(entries["x"])
    latents = codec.sample(moments, entries["eps"])
    ours = {"moments": moments, "z": latents, "decoded": codec.decode(latents)}
    for name, theirs in entries.items():
        if name.startswith("expect_"):
            quantity = name.removeprefix("expect_")
            if quantity not in ours:
                raise UserError(f"{case.path}: vae/{name}: expected one of {', '.join(f'expect_{q}' for q in ours)}")
            yield compare(f"vae/{name}", ours[quantity], theirs, gates.block)


def case_autoencoder(case: Case) -> FluxCodec:
    """The codec of a case that holds an autoencoder. Raises UserError for weights that do not fit."""
    shape = case.entry("vae")
    with tempfile.TemporaryDirectory() as folder:
        config = VaeConfig(
            codec="flux",
            path=str(Path(folder) / "ae.safetensors"),
            channels=shape["z_channels"],
            downsample=shape["downsample"],
            width=shape["ch"],
            width_multipliers=tuple(shape["ch_mult"]),
            res_blocks=shape["num_res_blocks"],
            scale=shape["scale_factor"],
            shift=shape["shift_factor"],
        )
        with safe_open(case.path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys() if "/" not in name}  # noqa: SIM118
        save_file(weights, str(config.path))
        try:
            return FluxCodec(config, load_autoencoder(config))
        except UserError as error:
            raise UserError(f"{case.path}: {error}") from error
