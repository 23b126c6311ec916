"""Targets of tests/support/fuzz.py: how inputs of one kind are made, who reads them, what must hold of the result.

A target gets a random generator and an empty folder. It returns "read" or "left out", raises UserError or SampleError
where the program refuses the input, and `Wrong` where the program took it and the result contradicts it.
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import safetensors
import sentencepiece
import torch
from safetensors.torch import save

from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.checkpoint.index import TYPES
from megabagel.checkpoint.manifest import MANIFEST, own_checksum, read_manifest, write_manifest
from megabagel.config.load import dump, load, to_dict
from megabagel.config.schema import Config, ModelConfig
from megabagel.config.typed_json import WrongValue, read_as
from megabagel.config.yaml_text import dump_yaml
from megabagel.data.decode import Request, measure
from megabagel.data.decode.host import HostEngine
from megabagel.data.documents import Task
from megabagel.data.index.index import build_index
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.tokenize.bpe import train_bpe
from megabagel.data.tokenize.tokenizer import ByteTokenizer, TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.runtime import cpu_backend
from megabagel.sequence.items import SPECIAL_TOKENS
from megabagel.train.anomaly import LossSpikeDetector
from megabagel.train.trainer import RunState
from tests.data.test_tar import GOOD, base256, block, member, pax
from tests.support.fuzz import DEEP, Wrong, as_json, mutated_bytes, mutated_json
from tests.support.pictures import file_of, noise
from tests.support.small_run import small_config, sources_of, write_data

Target = Callable[[random.Random, Path], str]
BYTES = ByteTokenizer()


def check(holds: bool, what: str) -> None:
    """Raise Wrong unless `holds`."""
    if not holds:
        raise Wrong(what)


# Configs


@cache
def valid_config() -> str:
    """YAML of a valid config."""
    return dump_yaml(to_dict(small_config(Path("data"))), sort_keys=False)


WORDS = (
    *("0", "-1", "1", "3", "1e3", "1e400", "0x10", "010", "1_000", "0b1", "1:30", "9" * 80, ".nan", "-.inf", "''", "~"),
    *("null", "true", "yes", "[]", "{}", "[1, 2]", "{a: 1}", "*a", "&a b", "!!int x", "!!python/name:os.system", "- 1"),
    *("'", '"', "a: b", "a #1", "~/x", "$HOME", "\x1b[31m", "\ud83d\ude00", "[" * 90, "{a: " * 70, "|", ">", "!", "%"),
    *("auto", "none", "bf16", "[a", "a]", "? x", "..", "---", "<<: {a: 1}", "2026-11-30", "=", "\0"),
)


def _same_when_written(config: Config, folder: Path) -> str:
    """A config that was taken is the same when it is written and read again."""
    dump(config, folder / "again.yaml")
    check(load(folder / "again.yaml") == config, "written and read again, the config is another")
    return "read"


def yaml_text(rng: random.Random, folder: Path) -> str:
    """A valid config with lines replaced, moved and spoiled."""
    lines = valid_config().splitlines()
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        match rng.randrange(6):
            case 0 | 1 | 2 if colon:
                lines[at] = f"{key}: {rng.choice(WORDS)}"
            case 3:
                lines[at] = rng.choice(("  ", "    ", "\t", "")) + lines[at].strip()
            case 4:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case _:
                del lines[at]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    (folder / "a.yaml").write_bytes(mutated_bytes(rng, data) if rng.random() < 0.2 else data)
    return _same_when_written(load(folder / "a.yaml"), folder)


@cache
def keys() -> list[str]:
    """Dotted keys of every option."""

    def walk(tree: Any, path: str) -> list[str]:
        entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        found = [key for name, value in entries for key in walk(value, f"{path}.{name}" if path else str(name))]
        return [*found, path] if path else found

    return walk(to_dict(small_config(Path("data"))), "")


def overrides(rng: random.Random, folder: Path) -> str:
    """A valid file, and words of a command line."""
    (folder / "a.yaml").write_text(valid_config())
    words = []
    for _ in range(rng.randrange(1, 4)):
        key = rng.choice(keys())
        if rng.random() < 0.2:
            key = mutated_bytes(rng, key.encode()).decode("utf-8", "surrogateescape")
        words.append(f"{key}={rng.choice(WORDS)}" if rng.random() < 0.95 else key)
    return _same_when_written(load(folder / "a.yaml", words), folder)


# Data sets


def index_of(shard: Path, task: Task, most: int = 1000) -> str:
    """Index a shard; every document's contents are read again, and no more of them exist than records."""
    index = build_index([shard], BYTES, task)
    check(len(index.documents) <= most, f"{len(index.documents)} documents")
    for document in index.documents:
        for text in document.texts:
            check(len(BYTES.encode(index.text(text))) == text.n_ids, "a text of another length")
        for image in document.images:
            check((image.height, image.width) == measure(index.image(image), verify=True), "an image of another size")
    return "left out" if index.skipped else "read"


@cache
def png() -> bytes:
    """A small picture."""
    return file_of(noise(8, 9))


FIELDS = ((0, 100), (100, 108), (108, 116), (124, 136), (136, 148), (148, 156), (156, 157), (157, 257), (257, 265))
"""Bytes of the fields of a tar header."""
PAX_KEYS = (b"size", b"path", b"linkpath", b"GNU.sparse.map", b"GNU.sparse.size", b"hdrcharset", b"mtime")


def tar_header(rng: random.Random, folder: Path) -> str:
    """Sound and spoiled members, headers whose checksum fits what they say, PAX records, cut and joined archives."""
    parts = [GOOD]
    for _ in range(rng.randrange(1, 4)):
        size = rng.choice([0, 1, 512, 2**33, 2**63 - 1, 2**63, 2**87, -1, -512, len(png())])
        name = rng.choice([b"h.png", b"h.txt", b"h.json", b"../h.png", b"/h.png", b"h", b"", b".h.png", b"\xff.png"])
        match rng.randrange(7):
            case 0:
                parts.append(
                    block(name, base256(size), rng.choice([b"0", b"1", b"2", b"3", b"6", b"L", b"S", b"x", b"\0"]))
                )
            case 1:
                key = rng.choice(
                    [b"size", b"path", b"linkpath", b"GNU.sparse.map", b"GNU.sparse.size", b"hdrcharset", b"mtime"]
                )
                parts.append(pax((key, str(size).encode()), kind=rng.choice([b"x", b"g"])))
            case 2:
                parts.append(member(b"././@LongLink", name + b"\0", rng.choice([b"L", b"K"])))
            case 3:
                parts.append(bytes(512 * rng.randrange(1, 4)))
            case 4:
                parts.append(
                    member(name, png(), rng.choice([b"0", b"7", b"1", b"2"]), rng.choice([b"", b"g1.png", b"gone"]))
                )
            case 5:
                parts.append(_spoiled_header(rng, member(b"s.png", png())))
            case _:
                parts.append(member(b"k.txt", b"a text") + member(b"k.png", png()))
    rng.shuffle(parts)
    data = b"".join(parts) + bytes(1024)
    (folder / "a.tar").write_bytes(mutated_bytes(rng, data) if rng.random() < 0.3 else data)
    return index_of(folder / "a.tar", "t2i")


def _spoiled_header(rng: random.Random, data: bytes) -> bytes:
    """A member with one field of random or odd bytes, and the checksum that fits."""
    first, last = rng.choice(FIELDS)
    new = bytearray(data)
    odd = rng.choice(
        [rng.randbytes(last - first), b"\xff" * (last - first), b"-" + b"7" * (last - first - 1), b"9" * (last - first)]
    )
    new[first:last] = odd[: last - first].ljust(last - first, b"\0")
    new[148:156] = b" " * 8
    new[148:156] = b"%06o\0 " % sum(new[:512])
    return bytes(new)


RECORDS: tuple[tuple[Task, Any], ...] = (
    ("text", {"text": "a text"}),
    ("t2i", {"image": "a.png", "text": "a page"}),
    ("t2i", {"file_name": "a.png", "caption": "a page", "extra": 1}),
    ("i2t", {"image": "a.png", "captions": '{"a": "one", "b": "two"}'}),
    ("i2t", {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
             "image": "a.png"}),
    ("i2t", {"messages": [
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "A."}]}),
    ("edit", {"image_list": ["a.png", "a.png", "a.png"], "instruction_list": [["one", "uno"], ["two"]]}),
    ("interleave", {"items": [{"type": "text", "text": ["a", "b"], "role": "condition"},
                              {"type": "image", "name": "a.png", "role": "condition"},
                              {"type": "video", "frames": ["a.png", "a.png"], "role": "target"}]}),
)  # fmt: skip
"""A record of each layout, and a task that it suits."""


def jsonl(rng: random.Random, folder: Path) -> str:
    """Records of every layout with changes, and lines that are none."""
    (folder / "a.png").write_bytes(png())
    task, sound = rng.choice(RECORDS)
    lines = [json.dumps(sound).encode()]
    for _ in range(rng.randrange(1, 5)):
        record = mutated_json(rng, rng.choice((sound, rng.choice(RECORDS)[1])), rng.randrange(0, 4))
        lines.append(as_json(rng, record) if rng.random() < 0.97 else DEEP)
    (folder / "a.jsonl").write_bytes(rng.choice((b"\n", b"\r\n")).join(lines))
    return index_of(folder / "a.jsonl", task, 1 + sum(line.count(b"\n") + 1 for line in lines))


def tar_record(rng: random.Random, folder: Path) -> str:
    """Records in a tar, one of them sound, with their pictures."""
    task, sound = rng.choice(RECORDS)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, record in (("k", mutated_json(rng, sound, rng.randrange(1, 4))), ("sound", sound)):
            text = as_json(rng, record) if key == "k" else json.dumps(sound).encode()
            for name, data in ((f"{key}.json", text), (f"{key}.a.png", png())):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                tar.addfile(about, io.BytesIO(data))
    return index_of(folder / "a.tar", task)


@cache
def parquet_files() -> tuple[tuple[Task, bytes], ...]:
    """Small parquet files of several layouts, and a task that each suits."""
    tables: tuple[tuple[Task, dict[str, Any]], ...] = (
        ("text", {"text": ["a", "b", "c"]}),
        ("t2i", {"image": [png(), png()], "captions": ['{"a": "x"}', "{}"]}),
        ("t2i", {"image": [png(), None], "text": ["a", "b"]}),
        ("edit", {"image_list": [[png(), png()]], "instruction_list": [[["make it blue"]]]}),
    )
    found: list[tuple[Task, bytes]] = []
    for task, columns in tables:
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, compression=["none", "snappy"][len(found) % 2])
        found.append((task, out.getvalue()))
    return tuple(found)


def parquet(rng: random.Random, folder: Path) -> str:
    """Bytes of a parquet file changed, its footer more often than its pages."""
    task, data = rng.choice(parquet_files())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    if rng.random() < 0.7:
        data = data[:footer] + mutated_bytes(rng, data[footer:-8], rng.randrange(1, 3)) + data[-8:]
    else:
        data = mutated_bytes(rng, data, rng.randrange(1, 3))
    (folder / "a.parquet").write_bytes(data)
    return index_of(folder / "a.parquet", task)


@cache
def pictures() -> tuple[bytes, ...]:
    """Small picture files of every format and some modes."""
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
    found = [file_of(noise(12, 14), kind) for kind in kinds]
    found += [
        file_of(noise(12, 14, mode), kind)
        for mode, kind in (("L", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"))
    ]
    return tuple(found)


def image(rng: random.Random, folder: Path) -> str:
    """Bytes of a picture changed; its header gives the size that decoding gives."""
    data = mutated_bytes(rng, rng.choice(pictures()), rng.randrange(1, 4))
    height, width = measure(data, verify=True)
    (found,) = HostEngine()([Request(data, ())])
    check(not isinstance(found, Exception), f"measured {height} x {width}, and not decoded: {found}")
    return "read"


# Weights and state


def _weights(rng: random.Random) -> bytes:
    """A safetensors file of two tensors, with its header or its bytes changed."""
    data = save({"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4.0).half()})
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:
        return mutated_bytes(rng, data, rng.randrange(1, 3))
    header = as_json(rng, mutated_json(rng, json.loads(data[8 : 8 + length]), rng.randrange(0, 3)))
    size = len(header) if rng.random() < 0.95 else rng.choice((0, 2**31, 2**63, 2**64 - 1, length + 1))
    return size.to_bytes(8, "little") + header + data[8 + length :]


def _read_all(files: TensorFiles) -> None:
    """Read every tensor, and compare with what the safetensors library reads."""
    if odd := [name for name in files.names if files.type(name) not in TYPES]:
        raise UserError(f"{odd[0]!r} has the type {files.type(odd[0])!r}")  # as import and export do
    for name in files.names:
        try:
            with safetensors.safe_open(files.where(name), "pt") as library:
                expected = library.get_tensor(name)
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
            raise Wrong(f"{name!r}: taken, and refused by the library: {error}") from error
        check(files.shape(name) == tuple(expected.shape), f"{name!r}: another shape")
        if expected.numel():
            found = torch.cat(list(files.lazy(name).read())) if files.shape(name) else files.rows(name, 0, 1)
            check(
                found.reshape(-1).view(torch.uint8).equal(expected.reshape(-1).view(torch.uint8)),
                f"{name!r}: other numbers",
            )


def safetensors_file(rng: random.Random, folder: Path) -> str:
    """A file whose header says what cannot be."""
    (folder / "a.safetensors").write_bytes(_weights(rng))
    _read_all(TensorFiles(folder / "a.safetensors"))
    return "read"


def shard_index(rng: random.Random, folder: Path) -> str:
    """An index of shards that places tensors where they are not."""
    for name in ("a", "b"):
        (folder / f"{name}.safetensors").write_bytes(save({name: torch.arange(6.0)}))
    content = {"metadata": {"total_size": 48}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    path = folder / "a.safetensors.index.json"
    path.write_bytes(as_json(rng, mutated_json(rng, content, rng.randrange(0, 3))))
    _read_all(TensorFiles(path))
    return "read"


def manifest(rng: random.Random, folder: Path) -> str:
    """A manifest with changes, and with the checksum that fits them."""
    made = folder / "step_00000003"
    made.mkdir()
    (made / "rank_00000.safetensors").write_bytes(b"numbers")
    grid = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "dp": 1}
    write_manifest(made, ModelConfig(), {}, step=3, grid=grid, ema=0.5, freeze=("vit",), seed=0)
    content = json.loads((made / MANIFEST).read_text())
    content.pop("checksum")
    content = mutated_json(rng, content, rng.randrange(0, 3))
    if isinstance(content, dict):
        try:
            content = {"checksum": own_checksum(content), **content}
        except ValueError:  # a lone surrogate has no digest
            content = {"checksum": "0", **content}
    (made / MANIFEST).write_bytes(as_json(rng, content))
    found = read_manifest(made)
    check(found.step >= 0 and 0 <= found.ema < 1 and min(found.grid.values(), default=1) >= 1, str(found))
    return "read"


@cache
def small_run(root: Path) -> tuple[Config, list[Any], dict[str, Any]]:
    """A config, its opened sources, and the state of a run after two steps."""
    write_data(root / "shapes")
    config = small_config(root / "shapes")
    sources = sources_of(config)
    plan = GlobalPlan(sources, config)
    for _ in range(2):
        state = plan.next_step().state
    judge = {"loss": [1.0, 2.0], "grad_norm": [0.5, 0.25]}
    return config, sources, {"plan": state, "updates": 2, "lost_images": 0, "judge": judge}


def state(rng: random.Random, folder: Path) -> str:
    """The state of a run with changes: refused, or a plan that goes on."""
    config, sources, content = small_run(folder.parent)
    plan = GlobalPlan(sources, config)
    try:
        found = read_as(RunState, json.loads(as_json(rng, mutated_json(rng, content, rng.randrange(0, 3)))))
        LossSpikeDetector(config.train).load_state(found.judge)
        plan.load_state(found.plan)
    except (WrongValue, ValueError) as error:  # ValueError: no JSON, which the manifest's checksum would tell
        raise UserError(str(error)) from error
    check(plan.next_step().size.samples > 0, "a step without samples")
    return "read"


# Tokenizers


@cache
def tokenizer_json() -> dict[str, Any]:
    """A small byte-level BPE."""
    return dict(json.loads(train_bpe(["a red circle on the left", "make it blue"] * 5, 300)))


def tokenizer(rng: random.Random, folder: Path) -> str:
    """A tokenizer.json with changes; ids of a text are ids of the vocabulary."""
    content = tokenizer_json()
    if rng.random() < 0.7:
        # The vocabulary is most of the file; elsewhere changes mean more.
        model = mutated_json(rng, {**content["model"], "vocab": {}, "merges": []}, rng.randrange(0, 3))
        content = mutated_json(rng, {**content, "model": {}}, rng.randrange(0, 2))
        if isinstance(model, dict) and isinstance(content, dict):
            content = {
                **content,
                "model": {**model, **{key: tokenizer_json()["model"][key] for key in ("vocab", "merges")}},
            }
        data = as_json(rng, content)
    else:
        data = mutated_bytes(rng, json.dumps(content).encode(), rng.randrange(1, 3))
    (folder / "tokenizer.json").write_bytes(data)
    return _encodes(load_tokenizer(str(folder)))


@cache
def sentencepiece_model() -> bytes:
    """A small sentencepiece model."""
    out = io.BytesIO()
    texts = iter(["a red circle on the left", "make it blue", "what is it?"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts,
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        control_symbols=list(SPECIAL_TOKENS),
    )
    return out.getvalue()


def sentencepiece_file(rng: random.Random, folder: Path) -> str:
    """Bytes of a sentencepiece model changed."""
    (folder / "a.model").write_bytes(mutated_bytes(rng, sentencepiece_model(), rng.randrange(1, 4)))
    return _encodes(load_tokenizer(str(folder / "a.model")))


def _encodes(found: TextTokenizer) -> str:
    """A tokenizer that was taken encodes texts, twice alike, into ids of its vocabulary."""
    for text in ("a red circle", "", "<|im_start|>", "é \U0001f600" * 20):
        ids = found.encode(text)
        check(all(0 <= number < found.vocab_size for number in ids), f"ids beyond {found.vocab_size}: {ids}")
        check(found.encode(text) == ids, "other ids the second time")
        found.decode(ids)
    return "read"


TARGETS: Mapping[str, Target] = {
    "YAML": yaml_text,
    "overrides": overrides,
    "tar headers": tar_header,
    "records in tars": tar_record,
    "JSONL": jsonl,
    "parquet": parquet,
    "images": image,
    "safetensors": safetensors_file,
    "shard index": shard_index,
    "manifest": manifest,
    "state": state,
    "tokenizer.json": tokenizer,
    "sentencepiece": sentencepiece_file,
}


def prepare(folder: Path) -> None:
    """Make the files that inputs are made from."""
    cpu_backend.install()
    valid_config()
    small_run(folder)
    for make in (parquet_files, pictures, tokenizer_json, sentencepiece_model, keys):
        make()
