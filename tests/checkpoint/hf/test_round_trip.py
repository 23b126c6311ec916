"""Published weights come out of a checkpoint as they went in, bit for bit, and lie in it under the right names."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabagel.checkpoint import lazy
from megabagel.checkpoint.hf.exporter import export
from megabagel.checkpoint.hf.importer import MODEL as MODEL_FILE
from megabagel.checkpoint.hf.importer import import_folder
from megabagel.checkpoint.hf.names import official_name, official_shapes
from megabagel.config.load import load
from megabagel.config.schema import ModelConfig, VitConfig
from tests.support.parity_files import all_cases, stem
from tests.support.published import MODEL, VARIANTS, Q, publish, publish_shards, weights
from tests.support.rank_pool import RankPool

CASES = [case for case in all_cases() if case.startswith(("train_", "infer_"))]
WEIGHTS = "ema.safetensors"
DATA = """
data:
  sources: [{name: a, path: a.tar}]
  vae_resize: {max_size: 48, min_size: 16}
  vit_resize: {max_size: 10, min_size: 4}
"""

WITHOUT_TWINS = {  # ours: published
    "embed.tokens.weight": "language_model.model.embed_tokens.weight",
    "embed.vit.patch_embedding.bias": "vit_model.vision_model.embeddings.patch_embedding.bias",
    "embed.vit.position_embedding.weight": "vit_model.vision_model.embeddings.position_embedding.weight",
    "embed.vit.layers.0.norm2.weight": "vit_model.vision_model.encoder.layers.0.layer_norm2.weight",
    "embed.vit.layers.0.k.bias": "vit_model.vision_model.encoder.layers.0.self_attn.k_proj.bias",
    "embed.vit.layers.0.o.weight": "vit_model.vision_model.encoder.layers.0.self_attn.out_proj.weight",
    "embed.vit.layers.0.fc1.weight": "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight",
    "embed.vit.post_norm.bias": "vit_model.vision_model.post_layernorm.bias",
    "embed.connector.fc2.weight": "connector.fc2.weight",
    "embed.time_embedder.mlp.0.weight": "time_embedder.mlp.0.weight",
    "embed.vae2llm.weight": "vae2llm.weight",
    "heads.lm_head.weight": "language_model.lm_head.weight",
    "heads.llm2vae.bias": "llm2vae.bias",
}
WITH_TWINS = {  # {} is und or gen in ours, nothing or _moe_gen in theirs
    "layers.1.input_norm.{}.weight": "language_model.model.layers.1.input_layernorm{}.weight",
    "layers.1.attention.{}.q.weight": "language_model.model.layers.1.self_attn.q_proj{}.weight",
    "layers.0.attention.{}.v.bias": "language_model.model.layers.0.self_attn.v_proj{}.bias",
    "layers.0.attention.{}.o.weight": "language_model.model.layers.0.self_attn.o_proj{}.weight",
    "layers.1.attention.{}.k_norm.weight": "language_model.model.layers.1.self_attn.k_norm{}.weight",
    "layers.0.mlp_norm.{}.weight": "language_model.model.layers.0.post_attention_layernorm{}.weight",
    "layers.1.mlp.{}.up.weight": "language_model.model.layers.1.mlp{}.up_proj.weight",
    "layers.1.mlp.{}.down.weight": "language_model.model.layers.1.mlp{}.down_proj.weight",
    "heads.norm.{}.weight": "language_model.model.norm{}.weight",
}
NAMES = WITHOUT_TWINS | {
    ours.format(expert): theirs.format(suffix)
    for ours, theirs in WITH_TWINS.items()
    for expert, suffix in (("und", ""), ("gen", "_moe_gen"))
}


def test_names() -> None:
    assert {ours: official_name(ours) for ours in NAMES} == NAMES


def test_full_size() -> None:
    tower = VitConfig(layers=26, hidden=1152, heads=16, ffn=4304)
    full = ModelConfig(layers=28, hidden=3584, heads=28, kv_heads=4, ffn=18944, vocab=152064, vit=tower)
    shapes = official_shapes(full)
    assert (len(shapes), sum(torch.Size(shape).numel() for shape in shapes.values())) == (1223, 14_607_260_128)
    assert shapes["vit_pos_embed.pos_embed"] == (4900, 3584)
    assert shapes["vit_model.vision_model.embeddings.patch_embedding.weight"] == (1152, 588)


@pytest.mark.parametrize("case", CASES)
def test_golden_weights(tmp_path: Path, case: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {name: tensor for name, tensor in load_file(f"{stem(case)}.safetensors").items() if "/" not in name}
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    config = json.loads(Path(f"{stem(case)}.json").read_text())["config"]
    for file in ("llm_config", "vit_config"):
        (source / f"{file}.json").write_text(json.dumps(config[file]))
    import_folder(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    for name in (WEIGHTS, "llm_config.json", "vit_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_and_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """Tensors in many pieces, of every type: equal to the byte, in the library's own order."""
    monkeypatch.setattr(lazy, "PIECE_BYTES", 100)
    tensors = weights(VARIANTS[variant])
    for name, dtype in zip(sorted(tensors), (torch.float16, torch.float64, torch.float32) * 4, strict=False):
        tensors[name] = tensors[name].to(dtype) if "pos_embed" not in name else tensors[name]
    source = publish(tmp_path / "source", tensors, VARIANTS[variant])
    import_folder(source, tmp_path / "checkpoint")
    summary = export(tmp_path / "checkpoint", tmp_path / "out")
    assert summary.tensors == len(tensors)
    assert summary.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_shards(tmp_path: Path) -> None:
    tensors = weights()
    import_folder(publish_shards(tmp_path / "source", tensors), tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert_equal(load_file(tmp_path / "out" / WEIGHTS), tensors)
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_one_branch(tmp_path: Path) -> None:
    """Without the generation branch its tensors are absent, and nobody asks for them."""
    model = replace(MODEL, visual_gen=False, variant="dense", qk_norm=False)
    source = publish(tmp_path / "source", weights(model), model)
    import_folder(source, tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()


def test_model_file(tmp_path: Path) -> None:
    """The deduced model, as the base of a run's config."""
    source = publish(tmp_path / "source", weights())
    import_folder(source, tmp_path / "checkpoint")
    (tmp_path / "run.yaml").write_text(f"base: checkpoint/{MODEL_FILE}\n{DATA}")
    assert load(tmp_path / "run.yaml", ["model.vocab=260"]).model == replace(MODEL, vocab=260)


def test_last_tower_layer_may_be_counted_or_not(tmp_path: Path) -> None:
    for name, count in (("with", 2), ("without", 1)):
        source = publish(tmp_path / name, weights())
        config = json.loads((source / "vit_config.json").read_text())
        (source / "vit_config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
        import_folder(source, tmp_path / f"{name}_imported")


def loaded(folder: str) -> dict[str, Any]:
    """Rows 1 to 7 of two tensors, in fp32, as a rank of some grid would load them."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from megabagel.checkpoint import api

    tensors = {}
    for name in ("layers.1.attention.und.q.weight", "layers.1.attention.gen.q.weight"):
        tensors[name] = ShardedTensor(
            key=f"weight/{name}",
            data=torch.full((6, 24), torch.nan),
            dtype=torch.float32,
            local_shape=(6, 24),
            global_shape=(24, 24),
            global_offset=(1, 0),
            axis_fragmentations=None,
        )
    held = {name: tensor.data for name, tensor in tensors.items()}
    api.load(Path(folder), tensors)
    return held


def test_ranks_load_it_in_their_own_type(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "PIECE_BYTES", 4 * 24 * 2)  # pieces of four rows
    tensors = weights()
    import_folder(publish(tmp_path / "source", tensors), tmp_path / "checkpoint")
    (got,) = ranks.run(1, loaded, str(tmp_path / "checkpoint"))
    for expert, name in (("und", Q), ("gen", Q.replace("q_proj", "q_proj_moe_gen"))):
        assert torch.equal(got[f"layers.1.attention.{expert}.q.weight"], tensors[name][1:7].float())


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
