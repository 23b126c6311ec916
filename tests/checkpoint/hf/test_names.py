"""The published checkpoint's tensors, written down here by docs/bagel.md#tensor-names and not by our mapping."""

from dataclasses import replace
from itertools import product
from math import prod

from megabagel.checkpoint.hf.names import official_name, official_shapes
from megabagel.config.schema import ModelConfig, VitConfig

H, V, FFN, LAYERS = 3584, 152064, 18944, 28
E, E_FFN, TOWER_LAYERS = 1152, 4304, 26
SEVEN_B = ModelConfig(
    layers=LAYERS, hidden=H, heads=28, kv_heads=4, ffn=FFN, vocab=V, vit=VitConfig(TOWER_LAYERS, E, 16, E_FFN, 14, 70)
)


def published() -> dict[str, tuple[int, ...]]:
    llm, tower = "language_model.model", "vit_model.vision_model"
    names: dict[str, tuple[int, ...]] = {
        f"{llm}.embed_tokens.weight": (V, H),
        "language_model.lm_head.weight": (V, H),
        f"{llm}.norm.weight": (H,),
        f"{llm}.norm_moe_gen.weight": (H,),
        "latent_pos_embed.pos_embed": (64 * 64, H),
        "vit_pos_embed.pos_embed": (70 * 70, H),
        f"{tower}.embeddings.patch_embedding.weight": (E, 588),
        f"{tower}.embeddings.patch_embedding.bias": (E,),
        f"{tower}.embeddings.position_embedding.weight": (70 * 70, E),
        f"{tower}.post_layernorm.weight": (E,),
        f"{tower}.post_layernorm.bias": (E,),
    }
    linears = {
        "time_embedder.mlp.0": (H, 256),
        "time_embedder.mlp.2": (H, H),
        "vae2llm": (H, 64),
        "llm2vae": (64, H),
        "connector.fc1": (H, E),
        "connector.fc2": (H, H),
    }
    for n, twin in product(range(LAYERS), ("", "_moe_gen")):
        layer = f"{llm}.layers.{n}"
        linears |= {f"{layer}.self_attn.q_proj{twin}": (H, H)}
        linears |= {f"{layer}.self_attn.{name}_proj{twin}": (512, H) for name in "kv"}
        names |= {f"{layer}.self_attn.o_proj{twin}.weight": (H, H)}
        names |= {f"{layer}.self_attn.{name}_norm{twin}.weight": (128,) for name in "qk"}
        names |= {f"{layer}.mlp{twin}.{name}_proj.weight": (FFN, H) for name in ("gate", "up")}
        names |= {f"{layer}.mlp{twin}.down_proj.weight": (H, FFN)}
        names |= {f"{layer}.{name}_layernorm{twin}.weight": (H,) for name in ("input", "post_attention")}
    for n in range(TOWER_LAYERS):
        layer = f"{tower}.encoder.layers.{n}"
        linears |= {f"{layer}.self_attn.{name}_proj": (E, E) for name in ("q", "k", "v", "out")}
        linears |= {f"{layer}.mlp.fc1": (E_FFN, E), f"{layer}.mlp.fc2": (E, E_FFN)}
        names |= {f"{layer}.layer_norm{i}.{leaf}": (E,) for i, leaf in product((1, 2), ("weight", "bias"))}
    for name, shape in linears.items():
        names |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return names


def test_the_7b_model_has_the_published_tensors() -> None:
    found = official_shapes(SEVEN_B)
    assert found == published()
    assert (len(found), sum(map(prod, found.values()))) == (1223, 14_607_260_128)


def test_variants_and_branches_leave_out_their_names() -> None:
    dense = official_shapes(replace(SEVEN_B, variant="dense"))
    assert not [name for name in dense if "moe_gen" in name]
    moe = {name for name in official_shapes(replace(SEVEN_B, variant="moe")) if "moe_gen" in name}
    gates = {
        f"language_model.model.layers.{n}.mlp_moe_gen.{p}_proj.weight"
        for n in range(28)
        for p in ("gate", "up", "down")
    }
    assert moe == gates | {"language_model.model.norm_moe_gen.weight"}
    plain = official_shapes(replace(SEVEN_B, visual_und=False, visual_gen=False, qk_norm=False, qkv_bias=False))
    assert {name.split(".")[0] for name in plain} == {"language_model"}
    assert not [name for name in plain if "bias" in name or "q_norm" in name]


def test_a_name_of_ours_has_one_of_theirs() -> None:
    assert (
        official_name("layers.3.attention.gen.q.bias") == "language_model.model.layers.3.self_attn.q_proj_moe_gen.bias"
    )
    assert official_name("layers.3.mlp.und.gate.weight") == "language_model.model.layers.3.mlp.gate_proj.weight"
    assert official_name("embed.vit.layers.1.v.bias") == "vit_model.vision_model.encoder.layers.1.self_attn.v_proj.bias"
    assert official_name("heads.norm.gen.weight") == "language_model.model.norm_moe_gen.weight"
