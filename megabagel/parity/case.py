"""Golden cases on disk: a safetensors file of numbers and a JSON file that says what they are.

Weights lie under their published names; everything else has a prefix: `batch/`, `expect/`, `grad/` and others.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabagel.checkpoint.hf.config import llm_fields, variant, vit_config
from megabagel.config.schema import ModelConfig, VaeConfig
from megabagel.errors import UserError

KINDS = ("train", "prim", "trace", "infer", "srum")

BRANCHES = {
    "visual_und": ("vit_model.", "connector.", "vit_pos_embed."),
    "visual_gen": ("time_embedder.", "vae2llm.", "llm2vae.", "latent_pos_embed."),
}
"""Weights that a case holds although the flag says that the model has no such branch."""


@dataclass(frozen=True)
class Case:
    """One case: where its files are, and the content of its JSON file."""

    path: Path
    """The safetensors file; a `srum` case of texts has none."""
    about: dict[str, Any]

    @property
    def name(self) -> str:
        """File name without suffix."""
        return self.path.stem

    @property
    def kind(self) -> str:
        """Kind of comparison: the first word of the case's name."""
        return self.name.partition("_")[0]

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The entries `prefix/...` by the rest of their name; bf16 comes as float32."""
        with safe_open(self.path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{prefix}/")]  # noqa: SIM118 (no mapping)
            found = {name.removeprefix(f"{prefix}/"): file.get_tensor(name) for name in names}
        return {name: x.float() if x.dtype is torch.bfloat16 else x for name, x in found.items()}

    @cached_property
    def weights(self) -> list[str]:
        """Published names of the weights of the branches that the model has."""
        absent = tuple(prefix for flag, prefixes in BRANCHES.items() for prefix in prefixes if not self.config[flag])
        with safe_open(self.path, "pt") as file:
            return [name for name in file.keys() if "/" not in name and not name.startswith(absent)]  # noqa: SIM118

    @property
    def groups(self) -> set[str]:
        """The prefixes of the case's entries."""
        with safe_open(self.path, "pt") as file:
            return {name.partition("/")[0] for name in file.keys() if "/" in name}  # noqa: SIM118

    @property
    def config(self) -> dict[str, Any]:
        """The official config."""
        return self.entry("config")

    def entry(self, key: str) -> Any:
        """One entry of the JSON file. Raises UserError when it is absent."""
        if key not in self.about:
            raise UserError(
                f"{self.path.with_suffix('.json')}: no entry {key!r}; expected a {self.kind} case of the format that "
                "docs/parity.md describes"
            )
        return self.about[key]


def stem_of(name: Path) -> Path:
    """The common path of a case's files."""
    return name.with_suffix("") if name.suffix in (".json", ".safetensors") else name


def open_case(name: Path) -> Case:
    """Find the two files of a case by either of them, or by their common path without suffix.

    Raises UserError for a file that is absent, damaged, or of a kind that is not known.
    """
    if name.is_dir():
        raise UserError(f"{name}: is a folder; expected a case in it, named by its file or by the path without suffix")
    stem = stem_of(name)
    path = stem.with_name(f"{stem.name}.safetensors")
    alone = path.name.startswith("srum_") and not path.exists()
    for file in (path, path.with_suffix(".json"))[alone:]:
        if not file.is_file():
            raise UserError(f"{file}: no such file; a case is a .safetensors and a .json file of one name")
    if path.name.partition("_")[0] not in KINDS:
        raise UserError(f"{path}: unknown kind of case; names start with one of {', '.join(k + '_' for k in KINDS)}")
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        if not alone:
            with safe_open(path, "pt"):
                pass
    except ValueError as error:
        raise UserError(f"{path.with_suffix('.json')}: not JSON ({error}); copy the case again") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); copy the case again") from error
    if not isinstance(about, dict):
        raise UserError(f"{path.with_suffix('.json')}: holds no JSON object; copy the case again")
    return Case(path, about)


@contextmanager
def understood(case: Case) -> Iterator[None]:
    """While a case is read, what goes wrong is a UserError: its files are not of the format."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"{case.path}: it and its JSON file do not make a {case.kind} case ({type(error).__name__}: {error}); copy "
            "the case again, or compare it with the format that docs/parity.md describes"
        ) from error


def model_config(case: Case) -> ModelConfig:
    """The model of a case. Raises UserError for what BAGEL does not have."""
    official, where = case.config, str(case.path.with_suffix(".json"))
    try:
        llm, vit, vae = official["llm_config"], official["vit_config"], official["vae_config"]
        return ModelConfig(
            variant=variant(llm["layer_module"], where),
            **llm_fields(llm),
            qk_norm=llm["qk_norm"],
            visual_und=official["visual_und"],
            visual_gen=official["visual_gen"],
            vit=vit_config(vit, vit["num_hidden_layers"], official["vit_max_num_patch_per_side"]),
            vae=VaeConfig(channels=vae["z_channels"], downsample=vae["downsample"]),
            latent_patch=official["latent_patch_size"],
            latent_grid=official["max_latent_size"],
            interpolate_pos=official["interpolate_pos"],
        )
    except KeyError as error:
        raise UserError(f"{where}: config has no entry {error}; expected the official model's config") from error
