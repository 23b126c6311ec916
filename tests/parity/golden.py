"""Cases computed with the official BAGEL code, as our model sees them: config, weights, and batch as `StageInputs`.

A case is a JSON file (config, samples, losses, gradient norms) and a safetensors file (weights under their published
names, the packed batch under `batch/`, results under `expect/`, gradients under `grad/`). Content comes from the case.
Who sees whom, RoPE positions, grid ids and the order of rows come from our own sequence code.

Legend: S tokens in sequence order, T rows of our [und | gen] layout with padding, U und and g gen rows of it, L latent
tokens, I latent images, C numbers of a latent token.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megabagel_kernels.attention.host import host_attention, plan_host
from megabagel_kernels.attention.mask import AttentionCodes
from megabagel_kernels.flow import noise_latents
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from megabagel.config.schema import ModelConfig, VaeConfig, VitConfig
from megabagel.model.bagel import Bagel
from megabagel.model.factory import SingleDevice
from megabagel.model.flow import timestep
from megabagel.model.inputs import Attend, LatentInputs, Rope, StageInputs, VitInputs
from megabagel.model.positions import rope_tables
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.items import Clip, Item, Latent, Mode, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.layout import Layout, build_layout, layout_rows
from megabagel.sequence.pack import Pack, build_pack, mask_codes
from megabagel.sequence.patches import patchify
from megabagel.sequence.sample import Dropout, Split, plan_sample

FOLDER = Path(os.environ.get("MEGABAGEL_PARITY_DIR", Path(__file__).parents[3] / "shared" / "parity"))
"""Where the cases lie; they are not part of this repository."""

CHUNK = 16
"""Rows of the layout's unit. With 16 both experts have padding rows in every case."""

VARIANTS = {"Qwen2DecoderLayer": "dense", "Qwen2MoEDecoderLayer": "moe", "Qwen2MoTDecoderLayer": "mot"}


@dataclass(frozen=True)
class Case:
    """One training case. Tensors are float32 (ids: int64) under the names that follow the prefix in the file."""

    config: ModelConfig
    timestep_shift: float
    weights: dict[str, Tensor]
    batch: dict[str, Tensor]
    expect: dict[str, Tensor]
    grad: dict[str, Tensor]
    about: dict[str, Any]
    pack: Pack
    layout: Layout

    def in_sequence(self, und_UI: Tensor, gen_gI: Tensor) -> Tensor:
        """Rows of our layout [U, I] and [g, I] as the official [S, I], padding left out."""
        row_S = self.layout.token_R.argsort()[-self.pack.tokens :]  # padding is -1 and comes first
        return torch.cat([und_UI, gen_gI])[torch.from_numpy(row_S)]


def load_case(name: str) -> Case:
    """Read a `train_*` case."""
    about = json.loads((FOLDER / f"{name}.json").read_text())
    sections: dict[str, dict[str, Tensor]] = {"": {}, "batch": {}, "expect": {}, "grad": {}}
    for key, tensor in load_file(FOLDER / f"{name}.safetensors").items():
        section, _, rest = key.rpartition("/")
        sections[section][rest] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    config = model_config(about["config"])
    pack = build_pack([
        plan_sample(items(sample, config), SampleKey(0, name, index, 0), Dropout())
        for index, sample in enumerate(about["samples"])
    ])  # fmt: skip
    layout = build_layout(pack, layout_rows(pack.tokens, CHUNK, cp=1), CHUNK, cp=1)
    weights, batch, expect, grad = sections.values()
    return Case(config, about["config"]["timestep_shift"], weights, batch, expect, grad, about, pack, layout)


def model_config(official: dict[str, Any]) -> ModelConfig:
    """Our names for the official config (bagel-reference section 1)."""
    llm, vit, vae = official["llm_config"], official["vit_config"], official["vae_config"]
    return ModelConfig(
        variant=VARIANTS[llm["layer_module"]],
        layers=llm["num_hidden_layers"],
        hidden=llm["hidden_size"],
        heads=llm["num_attention_heads"],
        kv_heads=llm["num_key_value_heads"],
        ffn=llm["intermediate_size"],
        vocab=llm["vocab_size"],
        qk_norm=llm["qk_norm"],
        norm_eps=llm["rms_norm_eps"],
        rope_base=llm["rope_theta"],
        visual_und=official["visual_und"],
        visual_gen=official["visual_gen"],
        vit=VitConfig(
            layers=vit["num_hidden_layers"],
            hidden=vit["hidden_size"],
            heads=vit["num_attention_heads"],
            ffn=vit["intermediate_size"],
            patch=vit["patch_size"],
            grid=official["vit_max_num_patch_per_side"],
            norm_eps=vit["layer_norm_eps"],
        ),
        vae=VaeConfig(channels=vae["z_channels"], downsample=vae["downsample"]),
        latent_patch=official["latent_patch_size"],
        latent_grid=official["max_latent_size"],
        interpolate_pos=official["interpolate_pos"],
    )


def items(sample: dict[str, Any], config: ModelConfig) -> list[Item]:
    """Our items for an official sequence plan. Each use of an image has an x_0 of its own, hence its own slot."""
    lengths, shapes = map(len, sample["text_ids_list"]), iter(sample["image_shapes"])
    result: list[Item] = []
    frames: list[Latent] = []
    steps: list[int | None] = []
    for slot, entry in enumerate(sample["sequence_plan"]):
        if entry["type"] == "text":
            result.append(Text(slot, next(lengths), loss=bool(entry["loss"])))
            continue
        _, height, width = next(shapes)
        if entry["type"] == "vit_image":
            result.append(Vit(slot, height // config.vit.patch, width // config.vit.patch))
            continue
        stride = config.latent_stride
        image = Latent(slot, height // stride, width // stride, noised=bool(entry["loss"]))
        if "split_start" not in entry:
            result.append(image)
            continue
        frames.append(image)
        steps.append(entry.get("frame_delta"))
        if entry["split_end"]:
            result.append(Clip(tuple(frames), tuple(steps)))
            frames, steps = [], []
    return result


def stage_inputs(case: Case) -> StageInputs:
    """The case's batch, in the order of our layout."""
    batch, token_T, border = case.batch, torch.from_numpy(case.layout.token_R), case.layout.borders[0]
    position_T = torch.from_numpy(case.pack.position_S)[token_T] * (token_T >= 0)
    word_U = _on_rows(case, "packed_text_indexes", token_T[:border])
    target_U = _on_rows(case, "ce_loss_indexes", token_T[:border])
    latent_g = _on_rows(case, "packed_vae_token_indexes", token_T[border:])
    return StageInputs(
        attend=_attend(case.layout.codes(case.pack, 0)),
        rope=Rope(*rope_tables(position_T, case.config.kv_channels, case.config.rope_base)),
        word_U=batch["packed_text_ids"][word_U] * (word_U >= 0),
        is_word_U=word_U >= 0,
        vit=_vit(case, token_T[:border]) if case.config.visual_und else None,
        latents=_latents(case, latent_g),
        ce_row_K=(target_U >= 0).nonzero()[:, 0],
        label_K=batch.get("packed_label_ids", token_T[:0])[target_U[target_U >= 0]],
        source_K=target_U[target_U >= 0] * 0,  # one source: these serve the log alone
        source_g=latent_g * 0,
    )


def _on_rows(case: Case, stream: str, token_T: Tensor) -> Tensor:
    """[T]: which entry of a stream, whose tokens the batch lists, stands on each row; -1 for none."""
    token_N = case.batch.get(stream, token_T[:0])
    entry_S = torch.full((case.pack.tokens,), -1)
    entry_S[token_N] = torch.arange(len(token_N))
    return torch.where(token_T >= 0, entry_S[token_T], -1)


def _attend(codes: AttentionCodes) -> Attend:
    plan = plan_host(codes)
    return lambda q, k, v: host_attention(q, k, v, plan)


def _vit(case: Case, token_U: Tensor) -> VitInputs:
    model = case.config
    images = [image for sample in case.pack.samples for image in sample.vits]
    grids = [grid_ids(image.rows, image.cols, model.vit.grid, model.interpolate_pos) for image in images]
    grid_V = torch.from_numpy(np.concatenate(grids))
    return VitInputs(
        patches=case.batch["packed_vit_tokens"],
        grid=grid_V,
        grid_all=grid_V,
        row_U=_on_rows(case, "packed_vit_token_indexes", token_U),
        attend=_attend(mask_codes([[Split(Mode.FULL, len(grid))] for grid in grids])),
        collect=lambda encoded: encoded,
    )


def _latents(case: Case, latent_g: Tensor) -> LatentInputs:
    """Latent -1 is padding: it takes the zeros that end every list."""
    model, batch, images = case.config, case.batch, case.pack.latents
    x0_LC, eps_LC, raw_L = torch.zeros(0, model.latent_dim), torch.zeros(0, model.latent_dim), torch.zeros(0)
    if images:
        eps_LC, raw_L, patch = batch["noise"], batch["packed_timesteps"], model.latent_patch
        x0_LC = torch.cat([
            patchify(latent[:, : image.rows * patch, : image.cols * patch], patch)
            for image, latent in zip(images, batch["padded_latent"], strict=True)
        ])  # fmt: skip
    grids = [grid_ids(image.rows, image.cols, model.latent_grid, model.interpolate_pos) for image in images]
    size_I = torch.tensor([len(grid) for grid in grids], dtype=torch.int64)
    t_L = timestep(raw_L, case.timestep_shift)
    return LatentInputs(
        x_t_gC=functional.pad(noise_latents(x0_LC, eps_LC, t_L), (0, 0, 0, 1))[latent_g],
        target_gC=functional.pad(eps_LC - x0_LC, (0, 0, 0, 1))[latent_g],
        weight_g=functional.pad((t_L > 0).float(), (0, 1))[latent_g],
        grid_g=torch.from_numpy(np.concatenate([*grids, [0]]))[latent_g],
        time_I=functional.pad(t_L[size_I.cumsum(0) - size_I], (0, 1)),
        image_g=functional.pad(torch.arange(len(images)).repeat_interleave(size_I), (0, 1))[latent_g],
    )


TOWER, LLM = "vit_model.vision_model.", "language_model.model."
TWIN = {"und": "", "gen": "_moe_gen"}
"""How the official names tell the experts apart."""

NAMES = (
    (r"embed\.words", LLM + "embed_tokens"),
    (r"embed\.vit\.(patch|position)_embedding", TOWER + "embeddings.{0}_embedding"),
    (r"embed\.vit\.layers\.(\d+)\.norm([12])", TOWER + "encoder.layers.{0}.layer_norm{1}"),
    (r"embed\.vit\.layers\.(\d+)\.qkv", TOWER + "encoder.layers.{0}.self_attn.[q|k|v]_proj"),
    (r"embed\.vit\.layers\.(\d+)\.o", TOWER + "encoder.layers.{0}.self_attn.out_proj"),
    (r"embed\.vit\.layers\.(\d+)\.fc([12])", TOWER + "encoder.layers.{0}.mlp.fc{1}"),
    (r"embed\.vit\.post_norm", TOWER + "post_layernorm"),
    (r"embed\.(connector\.fc[12]|vae2llm|time_embedder\.mlp\.[02])", "{0}"),
    (r"layers\.(\d+)\.input_norm\.(und|gen)", LLM + "layers.{0}.input_layernorm{1}"),
    (r"layers\.(\d+)\.attention\.(und|gen)\.qkv", LLM + "layers.{0}.self_attn.[q|k|v]_proj{1}"),
    (r"layers\.(\d+)\.attention\.(und|gen)\.([qk])_norm", LLM + "layers.{0}.self_attn.{2}_norm{1}"),
    (r"layers\.(\d+)\.attention\.(und|gen)\.o", LLM + "layers.{0}.self_attn.o_proj{1}"),
    (r"layers\.(\d+)\.mlp_norm\.(und|gen)", LLM + "layers.{0}.post_attention_layernorm{1}"),
    (r"layers\.(\d+)\.mlp\.(und|gen)\.gate_up", LLM + "layers.{0}.mlp{1}.[gate|up]_proj"),
    (r"layers\.(\d+)\.mlp\.(und|gen)\.down", LLM + "layers.{0}.mlp{1}.down_proj"),
    (r"heads\.norm\.(und|gen)", LLM + "norm{0}"),
    (r"heads\.lm_head", "language_model.lm_head"),
    (r"heads\.llm2vae", "llm2vae"),
)
"""Our modules, and theirs; `[q|k|v]` are several that lie side by side in one of ours."""


def official_names(name: str) -> list[str]:
    """Official tensors that make up our parameter `name`, in order along dimension 0 (bagel-reference section 2)."""
    module, _, leaf = name.rpartition(".")
    (theirs,) = (
        template.format(*(TWIN.get(group, group) for group in found.groups()))
        for pattern, template in NAMES
        if (found := re.fullmatch(pattern, module))
    )
    before, *blocks, after = re.split(r"[\[|\]]", theirs) if "[" in theirs else (theirs, "", "")
    return [f"{before}{block}{after}.{leaf}" for block in blocks]


def build_model(case: Case) -> Bagel:
    """The whole model on one device with the case's weights."""
    model = Bagel(case.config, SingleDevice())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.cat([case.weights[theirs] for theirs in official_names(name)]))
    return model


def official_gradients(case: Case, model: Bagel) -> Iterator[tuple[str, Tensor]]:
    """Gradients after backward under official names; zeros where a parameter has none."""
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        names = official_names(name)
        yield from zip(names, gradient.split([len(case.weights[theirs]) for theirs in names]), strict=True)
