"""What does not fit is refused in one message that names file, tensor and both values, and nothing is left behind."""

import json
import re
import resource
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megabagel.checkpoint.hf import folder as folder_module
from megabagel.checkpoint.hf.exporter import export
from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.hf.importer import import_folder, import_tensors
from megabagel.errors import UserError
from megabagel.model.positions import sincos_table
from tests.support.published import MODEL, VARIANTS, Q, Weights, publish, publish_shards, weights

Change = Callable[[Weights], object]


def refused(path: Path, *patterns: str) -> str:
    """The message with which importing `path` is refused; no trace of the checkpoint stays."""
    with pytest.raises(UserError) as caught:
        import_folder(path, path.parent / "checkpoint")
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)
    assert sorted(path.parent.iterdir()) == [path]
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda w: w.pop(Q), rf"1 tensor does.*\n  {Q}: missing, expected \[24, 24\]"),
        (lambda w: w.update({"extra": torch.zeros(2)}), r"  extra: unexpected, \[2\] in .*ema.safetensors"),
        (lambda w: w.update({Q: torch.zeros(24, 8)}), rf"  {Q}: \[24, 8\] in .*ema.safetensors, expected \[24, 24\]"),
        (lambda w: w.update({Q: w[Q].int()}), rf"  {Q}: type I32 in .*ema.safetensors, expected one of F64, F32"),
        (
            lambda w: w.update({"vae2llm.weight": torch.zeros(24, 65)}),
            r"vae2llm.weight: shape \[24, 65\], expected 16 x",
        ),
        (
            lambda w: w.update({"latent_pos_embed.pos_embed": torch.zeros(8, 24)}),
            r"latent_pos_embed.pos_embed: shape \[8, 24\], expected a square",
        ),
        (
            lambda w: w.update({"latent_pos_embed.pos_embed": w["latent_pos_embed.pos_embed"].roll(1, 1)}),
            r"ema.safetensors: tensor latent_pos_embed.pos_embed: row \d is .* off the 2-D sin-cos table",
        ),
        (
            lambda w: w.update({"vit_pos_embed.pos_embed": w["vit_pos_embed.pos_embed"] * torch.nan}),
            r"tensor vit_pos_embed.pos_embed: row 0 is nan off",
        ),
    ],
)
def test_tensors(tmp_path: Path, change: Change, pattern: str) -> None:
    tensors = weights()
    change(tensors)
    refused(publish(tmp_path / "source", tensors), pattern)


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    tensors = weights()
    del tensors[Q]
    tensors |= {"lm_head.weight": torch.zeros(2), "llm2vae.bias": torch.zeros(63)}
    message = refused(publish(tmp_path / "source", tensors), "3 tensors do not fit")
    assert [line.split(":")[0] for line in message.splitlines()[1:-1]] == [
        f"  {Q}",
        "  llm2vae.bias",
        "  lm_head.weight",
    ]


def test_columns_before_rows(tmp_path: Path) -> None:
    """A table with the halves swapped has every number, at another place."""
    tensors = weights()
    table = sincos_table(24, 5)
    tensors["vit_pos_embed.pos_embed"] = torch.cat([table[:, 12:], table[:, :12]], 1)
    refused(publish(tmp_path / "source", tensors), "tensor vit_pos_embed.pos_embed: row")


def test_latent_table_of_another_size(tmp_path: Path) -> None:
    """Both shapes, and the setting that the other one belongs to."""
    source = publish(tmp_path / "source", weights(replace(MODEL, latent_grid=2)))
    with pytest.raises(
        UserError, match=r"\[4, 24\] in .*, expected \[9, 24\] \(.*max_latent_size 2: .*latent_grid = 2"
    ):
        import_tensors(TensorFiles(source / "ema.safetensors"), MODEL, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("entry", "pattern"),
    [
        (
            {"layer_module": "LlamaDecoderLayer"},
            r"llm_config.json: layer_module = 'LlamaDecoderLayer'.*Qwen2MoTDecoderLa",
        ),
        ({"layer_module": "Qwen2DecoderLayer"}, r"layer_module = 'Qwen2DecoderLayer', .*dense.*variant mot"),
        ({"hidden_act": "gelu"}, r"llm_config.json: hidden_act = 'gelu', expected 'silu'"),
        ({"num_attention_heads": 5}, r"model.hidden = 24, model.heads = 5"),
        ({"hidden_size": "24"}, r"hidden_size is '24'; expected a whole number"),
        ({"rope_theta": "many"}, r"llm_config.json: cannot be understood"),
        ({"intermediate_size": 22}, r"mlp.down_proj.weight: \[24, 20\] in .*, expected \[24, 22\]"),
    ],
)
def test_language_model_config(tmp_path: Path, entry: dict[str, Any], pattern: str) -> None:
    refused(publish(tmp_path / "source", weights(), **entry), pattern)


@pytest.mark.parametrize("variant", ["moe", "dense"])
def test_layer_kind_that_fits(tmp_path: Path, variant: str) -> None:
    kind = {"moe": "Qwen2MoEDecoderLayer", "dense": "Qwen2DecoderLayer"}[variant]
    source = publish(tmp_path / "source", weights(VARIANTS[variant]), layer_module=kind)
    import_folder(source, tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("file", "content", "pattern"),
    [
        ("llm_config.json", None, "llm_config.json: cannot be read"),
        ("llm_config.json", "{", "llm_config.json: no JSON"),
        ("llm_config.json", "[]", "llm_config.json: holds list"),
        ("llm_config.json", "{}", "llm_config.json: has no entry 'num_hidden_layers'"),
        ("vit_config.json", '{"num_hidden_layers": 4}', "vit_config.json: has no entry 'hidden_size'"),
        ("ema.safetensors", None, "no weights there; expected ema.safetensors, model.safetensors"),
        ("ema.safetensors", "", "ema.safetensors: truncated: the file ends at byte 0"),
        ("ema.safetensors", "<html>" * 100, "ema.safetensors: no safetensors file"),
        ("ae.safetensors", struct.pack("<Q", 2) + b"{}", "ae.safetensors: no autoencoder of FLUX"),
    ],
)
def test_files(tmp_path: Path, file: str, content: str | bytes | None, pattern: str) -> None:
    source = publish(tmp_path / "source", weights())
    if content is None:
        (source / file).unlink()
    else:
        (source / file).write_bytes(content.encode() if isinstance(content, str) else content)
    refused(source, pattern)


def test_more_tower_layers_than_counted(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", weights())
    config = json.loads((source / "vit_config.json").read_text())
    (source / "vit_config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused(source, r"vit_config.json: num_hidden_layers = 3, but there are tensors of 1 layers; expected 1, or 2")


@pytest.mark.parametrize("share", [0.001, 0.5, 0.9999])
def test_truncated(tmp_path: Path, share: float) -> None:
    """In the header, in the middle and just before the end."""
    source = publish(tmp_path / "source", weights())
    whole = (source / "ema.safetensors").read_bytes()
    (source / "ema.safetensors").write_bytes(whole[: int(len(whole) * share)])
    refused(source, "ema.safetensors: truncated: ")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (
            lambda folder, index: (folder / index[Q]).unlink(),
            r"index.json: names model-0000\d.* the first, but there is no",
        ),
        (lambda folder, index: index.update({"extra": index[Q]}), r"places tensor extra in model-.*does not hold it"),
        (lambda folder, index: index.clear(), r"tensors do not fit"),
        (
            lambda folder, index: (
                save_file({Q: torch.zeros(24, 24), "b": torch.zeros(1)}, folder / "more.safetensors")
                or index.update({"b": "more.safetensors"})
            ),
            rf"tensor {Q} lies in model-.* and again in more.safetensors",
        ),
    ],
)
def test_index(tmp_path: Path, change: Callable[[Path, dict[str, str]], object], pattern: str) -> None:
    source = publish_shards(tmp_path / "source", weights())
    file = source / "model.safetensors.index.json"
    index = json.loads(file.read_text())["weight_map"]
    change(source, index)
    file.write_text(json.dumps({"weight_map": index}))
    refused(source, pattern)


SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]


def tokenizer_json(ids: dict[str, int]) -> dict[str, str]:
    added = [{"content": token, "id": number} for token, number in ids.items()]
    return {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added})}


def vocab_json(ids: dict[str, int]) -> dict[str, str]:
    added = {str(number): {"content": token} for token, number in ids.items()}
    return {"vocab.json": '{"a": 0}', "tokenizer_config.json": json.dumps({"added_tokens_decoder": added})}


@pytest.mark.parametrize("files", [tokenizer_json, vocab_json])
@pytest.mark.parametrize(
    ("ids", "pattern"),
    [
        (range(36, 40), None),
        (range(37, 41), r"token '<\|vision_end\|>' has id 40, but the model's vocabulary has 40 rows"),
        (range(36, 39), r"the vocabulary has no token <\|vision_end\|>"),
    ],
)
def test_tokenizer(tmp_path: Path, files: Any, ids: range, pattern: str | None) -> None:
    source = publish(tmp_path / "source", weights())
    for name, content in files(dict(zip(SPECIAL, ids, strict=False))).items():
        (source / name).write_text(content)
    if pattern:
        refused(source, next(iter(files({}))), pattern)
    else:
        import_folder(source, tmp_path / "checkpoint")
        export(tmp_path / "checkpoint", tmp_path / "out")
        for name, content in files(dict(zip(SPECIAL, ids, strict=False))).items():
            assert (tmp_path / "out" / name).read_text() == content


def test_existing_folder_stays(tmp_path: Path) -> None:
    source = publish(tmp_path / "source", weights())
    import_folder(source, tmp_path / "checkpoint")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for attempt in (
        lambda: import_folder(source, tmp_path / "checkpoint"),
        lambda: export(tmp_path / "checkpoint", source),
    ):
        with pytest.raises(UserError, match="exists already"):
            attempt()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = publish(tmp_path / "source", weights())
    with monkeypatch.context() as patch:
        usage = folder_module.shutil.disk_usage(tmp_path)
        patch.setattr(folder_module.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        refused(source, "checkpoint: cannot be written .*MiB are free")


@pytest.fixture
def small_files() -> Any:
    """The system refuses files beyond some size, as a quota does."""
    import signal

    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_disk_that_fills_up(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In the middle of the weights: what was written is removed."""
    source = publish(tmp_path / "source", weights())
    import_folder(source, tmp_path / "fine")
    request.getfixturevalue("small_files")
    for attempt in (
        lambda: import_folder(source, tmp_path / "out"),
        lambda: export(tmp_path / "fine", tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"out: cannot be written .*File too large"):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "source"]
