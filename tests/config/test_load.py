"""Files and overrides to a config: strict types, near names, one message for all problems, and the way back."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megabagel.config.load import dump, load, to_dict
from megabagel.config.schema import Config
from megabagel.config.typed import known_keys, nearest
from megabagel.errors import UserError
from tests.support.config_tree import VALID, change

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(text, name)` makes a file and returns its path."""

    def make(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return make


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    dump(VALID, tmp_path / "valid.yaml")
    return tmp_path / "valid.yaml"


def problems(path: Path, *overrides: str) -> list[str]:
    """Lines of the one error that loading gives, without the first, which counts them."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    first, *lines = str(caught.value).split("\n")
    assert f"{len(lines)} problem" in first
    assert str(path) in first
    return [line.strip() for line in lines]


# What is read


def test_file_and_overrides_reach_the_tree(valid: Path) -> None:
    config = load(
        valid,
        [
            "train.steps=7",
            "model.vit.layers=3",
            "data.sources.1.weight=2",
            "telemetry.sample_size.0=32",
            "parallel.layer_split=[4]",
            "model.head_dim=null",
            "run.dir=runs/a=b",
            "data.vit_resize={max_size: 98}",
            "train.steps=8",
        ],
    )
    assert config == change(
        VALID,
        {
            "train.steps": 8,
            "model.vit.layers": 3,
            "data.sources.1.weight": 2.0,
            "telemetry.sample_size": (32, 96),
            "parallel.layer_split": (4,),
            "run.dir": "runs/a=b",
            "data.vit_resize.max_size": 98,  # min_size stays
        },
    )


def test_keys_left_out_keep_their_defaults(write: Write) -> None:
    path = write("data: {sources: [{name: a, path: a.tar, task: text}]}\nmodel: {vit: {layers: 5}}\ntelemetry:\n")
    config = load(path)
    assert config.model == change(Config().model, {"vit.layers": 5})
    assert config.data.sources[0].weight == 1.0
    assert (config.train, config.telemetry) == (Config().train, Config().telemetry)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("3", 3.0), ("'0.5'", 0.5), ("1E-2", 0.01), (".5", 0.5)]
)
def test_spellings_of_numbers(valid: Path, text: str, value: float) -> None:
    lr = load(valid, [f"train.lr={text}"]).train.lr
    assert (lr, type(lr)) == (value, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=3.0", "an integer"),
        ("train.steps=1e3", "an integer"),
        ("train.steps=true", "an integer"),
        ("train.steps=", "an integer"),
        ("train.lr=fast", "a number"),
        ("train.lr=true", "a number"),
        ("train.lr=.nan", "a number"),
        ("train.lr=1e999", "a number"),
        ("parallel.sp=1", "true or false"),
        ("run.dir=12", "text (put quotes around it)"),
        ("train.precision=fp16", "one of fp32, bf16"),
        ("model.head_dim=wide", "an integer, or null"),
        ("parallel.layer_split=4", "a list of integers, or null"),
        ("parallel.layer_split=[2, two]", "a list of integers, or null"),
        ("telemetry.sample_size=[64]", "a list of 2 integers"),
        ("telemetry.sample_size.1=wide", "a list of 2 integers"),
        ("telemetry.prompts=a circle", "a list of texts"),
        ("data.sources={}", "a list of mappings"),
        ("data.sources=[3]", "a mapping with keys out of name, path, task, weight"),
        ("model.vit=3", "a mapping with keys out of layers, hidden"),
    ],
)
def test_wrong_types(valid: Path, override: str, expected: str) -> None:
    (line,) = problems(valid, override)
    key = override.partition("=")[0]
    assert line.startswith(key.removesuffix(".1"))
    assert f"expected {expected}" in line
    assert line.endswith("(command line)")


# Unknown keys


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("model.hiden", ["model.hidden"]),
        ("model.vit.head", ["model.vit.heads"]),
        ("train.learning_rate", []),
        ("train.tp", ["parallel.tp"]),  # the right name in the wrong section comes before a close one (clip)
        ("lr", ["train.lr"]),
        ("modle.vit.layers", ["model.vit.layers", "model.layers"]),
        ("modell", ["model"]),
        ("data.sources.1.wieght", ["data.sources.1.weight"]),
        ("data.source.0.weight", ["data.sources.*.weight", "data.val_sources.*.weight"]),
        ("telemetry.xyzzy", []),
    ],
)
def test_unknown_keys_name_the_nearest(valid: Path, key: str, names: list[str]) -> None:
    assert nearest(key) == names
    (line,) = problems(valid, f"{key}=3")
    assert line.startswith(f"{key} = 3: unknown key; ")
    for name in names:
        assert name in line
    if not names:
        assert "keys here are" in line


def test_unknown_keys_of_a_file(write: Write) -> None:
    path = write("data: {sources: [{name: a, path: a.tar, taks: text}]}\noptimiser: {lr: 1}\n")
    first, second = problems(path)
    assert first == f"data.sources.0.taks = 'text': unknown key; did you mean data.sources.0.task? ({path})"
    assert second.startswith("optimiser = {'lr': 1}: unknown key; keys here are run, model, parallel, data")


@given(st.sampled_from(sorted(key for key in known_keys() if not set(key) & set("*0123456789"))), st.data())
def test_one_letter_missing_finds_the_name(key: str, data: st.DataObject) -> None:
    section, _, name = key.rpartition(".")
    if len(name) < 5:
        return
    cut = data.draw(st.integers(1, len(name) - 1))
    typo = ".".join(filter(None, (section, name[:cut] + name[cut + 1 :])))
    if typo not in set(known_keys()):
        assert nearest(typo)[:1] == [key]


# All problems together


def test_two_wrong_keys_are_both_reported(valid: Path) -> None:
    first, second = problems(valid, "model.hiden=3", "train.setps=4")
    assert "model.hiden = 3" in first
    assert "did you mean model.hidden?" in first
    assert "train.setps = 4" in second
    assert "did you mean train.steps?" in second


def test_file_overrides_ranges_and_rules_are_reported_together(write: Write, valid: Path) -> None:
    path = write(f"base: {valid.name}\ntrain: {{clip: x}}\nmodel: {{kv_heads: 3, wide: 1}}\n")
    lines = problems(path, "data.lookahead=0", "parallel.tq=2", "nonsense", "train.seed=[")
    starts = [
        "parallel.tq",
        "'nonsense'",
        "train.seed",
        "model.wide",
        "train.clip",
        "data.lookahead",
        "model.heads = 4",
    ]
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1
    assert sum(line.endswith("(command line)") for line in lines) == 3
    assert sum(line.endswith(f"({path})") for line in lines) == 2


def test_rules_do_not_judge_what_was_not_understood(valid: Path) -> None:
    """heads keeps its default where its value is wrong; no message may be about that default."""
    (line,) = problems(valid, "model.heads=four", "model.kv_heads=3")
    assert line.startswith("model.heads = 'four'")
    (line,) = problems(valid, "model.hed=3", "model.kv_heads=3")  # the nearest name may be what was meant
    assert "did you mean model.heads?" in line


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.sources.3.weight=2", "data.sources has 3 entries, numbered from 0"),
        ("parallel.layer_split.0=2", "parallel.layer_split is None; set parallel.layer_split as a whole"),
        ("model.hidden.x=2", "unknown key"),
        ("data.sources.first.weight=2", "unknown key"),
        ("=3", "unknown key"),
        ("train.steps", "expected section.key=value"),
        ("train.steps={a: 1, a: 2}", "key 'a' is given twice"),
        (
            "run.dir=!!timestamp 2026-02-30",
            "'2026-02-30' is no value (day is out of range for month); put quotes around it",
        ),
        ("train.lr=!!int 0b_", "'0b_' is no value (invalid literal for int() with base 10"),
        ('run.dir="\\U00110000"', "not in range"),
    ],
)
def test_overrides_without_a_place(valid: Path, override: str, words: str) -> None:
    (line,) = problems(valid, override)
    assert words in line
    assert override.partition("=")[0] in line


def test_overrides_of_sections_that_the_file_spoiled(write: Write) -> None:
    path = write("model: [1]\ndata: {sources: {a: 1}}\n")
    lines = problems(path, "model.hidden=64", "data.sources.0.weight=2")
    assert [line.split(":")[0] for line in lines] == [
        "model.hidden = 64",
        "data.sources.0.weight = 2",
        "model = [1]",
        "data.sources = {'a'",
    ]


# Files


def test_base_files_are_merged_key_by_key(write: Write, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(
        "data: {sources: [{name: a, path: a.tar, task: text}], min_tokens: 300}\ntrain: {lr: 0.5}\n", "base/root.yaml"
    )
    write("base: root.yaml\ntrain: {steps: 50, lr: 0.25}\n", "base/middle.yaml")
    config = load(write("base: base/middle.yaml\ntrain: {lr: 0.125, warmup: 3}\n"))
    assert (config.train.lr, config.train.steps, config.train.warmup) == (0.125, 50, 3)
    assert (config.data.min_tokens, config.data.sources[0].name) == (300, "a")
    config = load(write("base: base/middle.yaml\ndata: {sources: [{name: b, path: b.tar, task: text}]}\n"))
    assert [source.name for source in config.data.sources] == ["b"]  # lists are replaced, not joined


def test_problems_name_the_file_they_come_from(write: Write) -> None:
    base = write("train: {lr: x, eps: y}\ndata: {sources: [{name: a, path: a.tar, task: text}]}\n", "base.yaml")
    path = write("base: base.yaml\ntrain: {eps: z}\n")
    assert problems(path) == [
        f"train.lr = 'x': expected a number ({base})",
        f"train.eps = 'z': expected a number ({path})",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  lr: [1\n", "line 3, column 1"),
        ("train:\n\tlr: 1\n", "line 2, column 1"),
        ("train: {lr: 1}\nmodel:\n  heads: 4\n  heads: 8\n", "line 4, column 3: key 'heads' is given twice"),
        ("train: *missing\n", "line 1, column 8: found undefined alias 'missing'"),
        (
            "run:\n  dir: !!timestamp 2026-02-30\n",
            "line 2, column 8: '2026-02-30' is no value (day is out of range for month)",
        ),
        ("train: {lr: !!int 0b_}\n", "line 1, column 13: '0b_' is no value (invalid literal for int() with base 10"),
        ('run: {dir: "\\U00110000"}\n', "chr() arg not in range(0x110000)"),
        ("a: 1\n---\nb: 2\n", "line 2"),
        ("", "holds None; expected a mapping with sections run, model"),
        ("- 1\n- 2\n", "holds [1, 2]; expected a mapping"),
        ("just text\n", "holds 'just text'; expected a mapping"),
        ("a: \0\n", "special characters are not allowed"),
        ("base: [a.yaml]\n", "base = ['a.yaml']: expected the name of one YAML file"),
        ("base: gone.yaml\n", "gone.yaml: cannot read the config: No such file"),
        ("base: run.yaml\n", "'base' runs in a circle"),
    ],
)
def test_unreadable_files(write: Write, text: str, words: str) -> None:
    path = write(text)
    with pytest.raises(UserError) as caught:
        load(path)
    assert words in str(caught.value)
    assert str(path.parent) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_long_circles_name_every_file(write: Write) -> None:
    write("base: c.yaml\n", "b.yaml")
    write("base: a.yaml\n", "c.yaml")
    with pytest.raises(UserError, match=r"a\.yaml -> .*b\.yaml -> .*c\.yaml -> .*a\.yaml"):
        load(write("base: b.yaml\n", "a.yaml"))


def test_missing_files_folders_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: cannot read the config: No such file"):
        load(tmp_path / "gone.yaml")
    with pytest.raises(UserError, match="cannot read the config: Is a directory"):
        load(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"image\.yaml: byte 0 is not UTF-8 text"):
        load(tmp_path / "image.yaml")


# And back


def test_dump_gives_the_same_config(tmp_path: Path) -> None:
    odd = change(
        VALID,
        {
            "run.dir": "läufe/1e-4 # no: comment",
            "train.lr": 1e-7 / 3,
            "train.eps": 1e-15,
            "model.head_dim": 32,
            "parallel.layer_split": (4,),
            "telemetry.prompts": ("null", "12", "two\nlines", " x" * 80, "ein grüner Kreis ○", "yes"),
            "telemetry.peak_tflops": 1e22,
        },
    )
    path = tmp_path / "config.yaml"
    dump(odd, path)
    assert load(path) == odd
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == to_dict(odd)


def test_to_dict_has_every_key() -> None:
    def keys(node: Any, path: str = "") -> list[str]:
        if isinstance(node, list):
            return [key for item in node for key in keys(item, f"{path}.*")]
        if isinstance(node, dict):
            return [key for name, item in node.items() for key in keys(item, f"{path}.{name}")]
        return [path.lstrip(".")]

    filled = change(VALID, {"parallel.layer_split": (4,), "train.freeze": ("vit",)})
    leaves = {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}
    assert set(keys(to_dict(filled))) == leaves


def test_dump_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write the config: No such file"):
        dump(VALID, tmp_path / "gone" / "config.yaml")


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        VALID.train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_examples_load(path: Path) -> None:
    load(path, ["model.vae.codec=blocks"])  # the recipes of BAGEL name a file of weights that every user has to fetch
