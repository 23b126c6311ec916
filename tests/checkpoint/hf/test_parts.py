"""Qwen2.5, SigLIP and FLUX put together: what is taken, copied, converted, made, and left out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.checkpoint.hf.exporter import export
from megabagel.checkpoint.hf.importer import MODEL as MODEL_FILE
from megabagel.checkpoint.hf.parts import import_parts
from megabagel.config.schema import ModelConfig, VaeConfig, VitConfig
from megabagel.errors import UserError
from megabagel.model.init_weights import initial_values
from megabagel.model.vae_flux import Autoencoder

Weights = dict[str, torch.Tensor]

LLM = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 20,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
VIT = {"hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 2}


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> Weights:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def qwen() -> Weights:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 24), "model.norm.weight": (24,)}
    for layer in (f"model.layers.{number}." for number in range(2)):
        shapes |= {f"{layer}{norm}_layernorm.weight": (24,) for norm in ("input", "post_attention")}
        for part, rows in (("q", 24), ("k", 8), ("v", 8)):
            shapes |= {
                f"{layer}self_attn.{part}_proj.weight": (rows, 24),
                f"{layer}self_attn.{part}_proj.bias": (rows,),
            }
        shapes |= {f"{layer}self_attn.o_proj.weight": (24, 24), f"{layer}mlp.down_proj.weight": (24, 20)}
        shapes |= {f"{layer}mlp.{part}_proj.weight": (20, 24) for part in ("gate", "up")}
    return draw(shapes | {"lm_head.weight": (40, 24)}, torch.bfloat16)


def siglip(side: int) -> Weights:
    before = "vision_model.embeddings."
    shapes: dict[str, tuple[int, ...]] = {
        f"{before}patch_embedding.weight": (12, 3, 2, 2),
        f"{before}patch_embedding.bias": (12,),
        f"{before}position_embedding.weight": (side * side, 12),
        "vision_model.post_layernorm.weight": (12,),
        "vision_model.post_layernorm.bias": (12,),
        "vision_model.head.probe": (1, 1, 12),
        "text_model.final_layer_norm.bias": (12,),
        "logit_scale": (1,),
    }
    for layer in (f"vision_model.encoder.layers.{number}." for number in range(3)):
        for module, rows, columns in (
            *((f"self_attn.{part}_proj", 12, 12) for part in ("q", "k", "v", "out")),
            ("mlp.fc1", 18, 12),
            ("mlp.fc2", 12, 18),
        ):
            shapes |= {f"{layer}{module}.weight": (rows, columns), f"{layer}{module}.bias": (rows,)}
        shapes |= {f"{layer}layer_norm{number}.{leaf}": (12,) for number in (1, 2) for leaf in ("weight", "bias")}
    return draw(shapes, torch.float32)


class Parts:
    """Three parts in a folder, to be changed before they are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.qwen, self.siglip = qwen(), siglip(side=4)
        self.llm: dict[str, Any] = dict(LLM)
        self.vit: dict[str, Any] = {"vision_config": VIT, "model_type": "siglip"}
        self.vae = VaeConfig(codec="flux", width=32, width_multipliers=(1, 2), res_blocks=1, downsample=2)

    def write(self, llm: str = "llm", vit: str = "vit", vae: str = "flux.safetensors") -> tuple[Path, Path, Path]:
        """Write the parts under these names."""
        for name, config, tensors in ((llm, self.llm, self.qwen), (vit, self.vit, self.siglip)):
            (self.folder / name).mkdir()
            (self.folder / name / "config.json").write_text(json.dumps(config))
            save_file(tensors, self.folder / name / "model.safetensors")
        save_file(Autoencoder(self.vae).state_dict(), self.folder / vae)
        return self.folder / llm, self.folder / vit, self.folder / vae

    def imported(self, **options: Any) -> tuple[Weights, list[str]]:
        """What an import gives: exported again, so by published names; and what it says of it."""
        done = import_parts(*self.write(), self.folder / "checkpoint", **({"latent_grid": 3, "vit_grid": 4} | options))
        export(self.folder / "checkpoint", self.folder / "out")
        return load_file(self.folder / "out" / "ema.safetensors"), list(done.notes)


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def test_mixture_of_transformers(parts: Parts) -> None:
    found, notes = parts.imported(seed=7)
    tower = {name: tensor for name, tensor in parts.siglip.items() if f"vit_model.{name}" in found}
    assert len(tower) == 3 + 2 + 2 * 16
    for name, tensor in parts.qwen.items():
        assert torch.equal(found.pop(f"language_model.{name}"), tensor)
        head, _, leaf = name.rpartition(".")
        twin = f"language_model.{head.replace('mlp.', 'mlp_moe_gen.')}{'' if 'mlp.' in head else '_moe_gen'}.{leaf}"
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(found.pop(twin), tensor)
    patches = tower.pop("vision_model.embeddings.patch_embedding.weight")
    linear = found.pop("vit_model.vision_model.embeddings.patch_embedding.weight")
    for row in range(2):
        for column in range(2):
            for channel in range(3):
                assert torch.equal(linear[:, (row * 2 + column) * 3 + channel], patches[:, channel, row, column])
    for name, tensor in tower.items():
        assert torch.equal(found.pop(f"vit_model.{name}"), tensor)
    for layer in range(2):
        for norm in ("q_norm", "k_norm", "q_norm_moe_gen", "k_norm_moe_gen"):
            ones = found.pop(f"language_model.model.layers.{layer}.self_attn.{norm}.weight")
            assert torch.equal(ones, torch.ones(8))
    for name in ("llm2vae.weight", "llm2vae.bias", "vae2llm.bias", "connector.fc2.bias", "time_embedder.mlp.0.bias"):
        assert not found.pop(name).any()
    model = ModelConfig()
    drawn = initial_values("embed.connector.fc1.weight", (24, 12), model, 7)
    assert torch.equal(found.pop("connector.fc1.weight"), drawn)
    assert sorted(found) == [
        "connector.fc1.bias",
        "connector.fc2.weight",
        "latent_pos_embed.pos_embed",
        "time_embedder.mlp.0.weight",
        "time_embedder.mlp.2.bias",
        "time_embedder.mlp.2.weight",
        "vae2llm.weight",
        "vit_pos_embed.pos_embed",
    ]
    vit = parts.folder / "vit" / "model.safetensors"
    assert notes == [
        f"left out of {vit}: text model (1)",
        f"left out of {vit}: pooling head (1)",
        f"left out of {vit}: contrastive scale and bias (1)",
        f"left out of {vit}: last layer (16)",
        *notes[4:],
    ]
    assert sorted(notes[4:]) == [
        "tensors copied from the understanding expert: 25",
        "tensors made a linear from the convolution over patches: 1",
        "tensors new, from seed 7: 12",
        "tensors of ones, as q/k norms: 8",
        "tensors taken over: 63",
    ]


@pytest.mark.parametrize(("variant", "twins"), [("moe", 2 * 3 + 1), ("dense", 0)])
def test_other_variants(parts: Parts, variant: str, twins: int) -> None:
    found, _ = parts.imported(variant=variant)
    assert sum("_moe_gen" in name for name in found) == twins


def test_given_norms_are_taken(parts: Parts) -> None:
    given = {
        f"model.layers.{layer}.self_attn.{part}_norm.weight": torch.randn(8)
        for layer in range(2)
        for part in ("q", "k")
    }
    parts.qwen |= given
    found, _ = parts.imported()
    for name, tensor in given.items():
        for suffix in ("_norm.", "_norm_moe_gen."):
            assert torch.equal(found[f"language_model.{name.replace('_norm.', suffix)}"], tensor)


def test_tied_head(parts: Parts) -> None:
    """The head becomes a copy of the embedding, and the exported config says that they are no longer tied."""
    del parts.qwen["lm_head.weight"]
    parts.llm["tie_word_embeddings"] = True
    found, notes = parts.imported()
    assert torch.equal(found["language_model.lm_head.weight"], parts.qwen["model.embed_tokens.weight"])
    assert "tensors copied from the word embedding, to which it was tied: 1" in notes
    assert json.loads((parts.folder / "out" / "llm_config.json").read_text())["tie_word_embeddings"] is False


def test_positions_of_another_grid(parts: Parts) -> None:
    """Cubic convolution over four cells a side, the centre of the cell at (3, 4) of 8 x 8 being at (1.25, 1.75)."""

    def kernel(distance: float, a: float = -0.75) -> float:
        if distance <= 1:
            return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        return a * (distance**3 - 5 * distance**2 + 8 * distance - 4)

    table = parts.siglip["vision_model.embeddings.position_embedding.weight"].reshape(4, 4, 12)
    expected = sum(
        kernel(abs(row - 1.25)) * kernel(abs(column - 1.75)) * table[row, column]
        for row in range(4)
        for column in range(4)
    )
    found, notes = parts.imported(vit_grid=8)
    resized = found["vit_model.vision_model.embeddings.position_embedding.weight"].reshape(8, 8, 12)
    torch.testing.assert_close(resized[3, 4], expected)
    assert "tensors resized (bicubic), as positions, from 4 x 4 to 8 x 8: 1" in notes


def test_model_file_names_the_copied_autoencoder(parts: Parts) -> None:
    parts.imported()
    text = (parts.folder / "checkpoint" / MODEL_FILE).read_text()
    copied = parts.folder / "checkpoint" / "official" / "ae.safetensors"
    assert f"path: {copied}" in text
    assert copied.read_bytes() == (parts.folder / "flux.safetensors").read_bytes()
    assert (parts.folder / "out" / "ae.safetensors").read_bytes() == copied.read_bytes()
    manifest = json.loads((parts.folder / "checkpoint" / "manifest.json").read_text())
    assert manifest["model"]["vit"] == vars(VitConfig(2, 12, 2, 18, 2, 4))
    assert (manifest["model"]["vae"]["width_multipliers"], manifest["model"]["vae"]["downsample"]) == ([1, 2], 2)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda p: p.qwen.pop("lm_head.weight"), r"llm.*\n  lm_head.weight: missing"),
        (lambda p: p.qwen.update({"model.layers.1.self_attn.q_norm.weight": torch.ones(8)}), r"k_norm.weight: missing"),
        (lambda p: p.siglip.update({"visual_projection": torch.ones(8)}), r"vit.*\n  visual_projection: unexpected"),
        (
            lambda p: p.siglip.update({"vision_model.embeddings.patch_embedding.weight": torch.ones(12, 3, 4, 4)}),
            r"patch_embedding.weight: \[12, 3, 4, 4\] in .*, expected \[12, 3, 2, 2\]",
        ),
        (
            lambda p: p.siglip.update({"vision_model.embeddings.position_embedding.weight": torch.ones(15, 12)}),
            r"position_embedding.weight: \[15, 12\] in .*, expected \[16, 12\]",
        ),
        (lambda p: p.vit["vision_config"].update(hidden_act="relu"), r"hidden_act = 'relu', expected 'gelu_pytorch_t"),
        (lambda p: p.llm.pop("hidden_size"), r"llm.config.json: has no entry 'hidden_size'"),
    ],
)
def test_parts_that_do_not_fit(parts: Parts, change: Any, pattern: str) -> None:
    parts.vit["vision_config"] = dict(VIT)
    change(parts)
    with pytest.raises(UserError, match=pattern):
        parts.imported()
    assert not (parts.folder / "checkpoint").exists()
