"""`megabagel init`: a commented config for a folder of shards, with sizes measured in the data.

The defaults of single keys do not fit together for every data set: image sides decide position tables and tokens per
sample, which decide the packs. Here all of them follow from the index of the data.
"""

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megabagel.config.load import load
from megabagel.config.schema import Config, DataConfig, ResizeConfig, SourceConfig
from megabagel.config.yaml_text import load_word
from megabagel.data.documents import Task
from megabagel.data.index import index as indexing
from megabagel.data.index.index import Index, build_index
from megabagel.data.index.shard_files import SUFFIXES
from megabagel.data.plan.planned_sample import Rules
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.errors import UserError
from megabagel.sequence.keys import SampleKey

SIDES = {"small": 256, "published": 1024}
"""Longest side of images in pixels: for a small model from scratch, and for published weights."""
VIT_SIDES = (224, 518)
"""BAGEL's bounds of the sides that the ViT sees."""
MOST_TOKENS = 2**14
"""Largest pack that is proposed."""
LOOKED_AT = 5000
"""Samples per source whose tokens are counted."""

_PREFERENCE: tuple[Task, ...] = ("video", "edit", "i2t", "interleave", "text")
"""Tasks in the order in which the first with the most samples is taken, where captions and pairs do not decide."""


@dataclass(frozen=True)
class FoundSource:
    """Shards of one name, the task that they suit, and their index."""

    name: str
    pattern: str
    """Glob, relative to the folder."""
    task: Task
    index: Index


@dataclass(frozen=True)
class Sizes:
    """Numbers of a config that follow from the data."""

    vae: ResizeConfig
    vit: ResizeConfig
    tokens: int
    """Tokens of a pack."""
    longest: int
    """Tokens of the longest sample."""
    steps_per_pass: int
    """Steps in which every sample is met about once."""


def starter_config(folder: Path, out: Path, *, tokenizer: str | None, weights: Path | None) -> str:
    """Index the shards under `folder`, write a config for them to `out`, and return a summary.

    Args:
        folder: has shards, also in folders below.
        out: file to write; must not exist.
        tokenizer: `data.tokenizer`; None: that of the weights, else bytes.
        weights: folder of `megabagel import-hf` to start from; None: a small model with random weights.

    Raises:
        UserError: no shards, no usable sample, `out` exists, or `weights` is no import.
    """
    if out.exists():
        raise UserError(f"{out} exists already. Name another file with --out, or remove it.")
    if weights is not None and not (weights / "model.yaml").is_file():
        raise UserError(f"--weights {weights}: no model.yaml in it. Expected what `megabagel import-hf` wrote.")
    tokenizer = tokenizer or _tokenizer_of(weights)
    sources = find_sources(folder, tokenizer)
    # Only the section `model` is used; the rest makes a valid config of it, whatever its grids are.
    rest = ["data.sources=[{name: any, path: any, task: text}]", "model.interpolate_pos=true"]
    base = Config() if weights is None else load(weights / "model.yaml", rest)
    sizes = measured(sources, base, SIDES["small" if weights is None else "published"])
    text = _yaml(folder, sources, sizes, tokenizer, weights)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}). Name another file with --out.") from error
    load(out)
    told = [f"{one.name}: {one.task}, {len(one.index.documents):,} samples" for one in sources]
    skipped = {one.pattern: len(one.index.skipped) for one in sources if one.index.skipped}
    told += [f"{pattern}: {count:,} samples cannot be used" for pattern, count in skipped.items()]
    return "\n".join([
        *(f"  {line}" for line in told),
        f"wrote {out}. Next:",
        f"  megabagel data inspect {out} --out sample.html   # one sample as the model sees it",
        f"  megabagel train {out}",
    ])  # fmt: skip


def _tokenizer_of(weights: Path | None) -> str:
    """The tokenizer that belongs to imported weights, or bytes."""
    if weights is not None and (weights / "official" / "tokenizer.json").is_file():
        return str(weights / "official")
    return "bytes"


def find_sources(folder: Path, tokenizer: str) -> list[FoundSource]:
    """Find the shards under a folder, grouped by name, and the tasks that they suit.

    Raises:
        UserError: no folder, no shards, or shards of which no sample suits any task.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Expected a folder of shards (.tar, .parquet, .jsonl).")
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix in SUFFIXES and path.is_file() and not hidden:
            groups.setdefault(_pattern(path.relative_to(folder)), []).append(path)
    if not groups:
        raise UserError(
            f"{folder}: no shards in it. Expected .tar, .parquet or .jsonl files; `megabagel data prepare {folder} "
            "OUT` makes some from images and texts."
        )
    counted = load_tokenizer(tokenizer)
    found: list[FoundSource] = []
    for pattern, shards in groups.items():
        with _quiet():
            by_task = {task: index for task in ("t2i", *_PREFERENCE) if (index := _index(shards, counted, task))}
        if not by_task:
            build_index(shards, counted, "interleave")  # raises with the reasons
        for task in _tasks(by_task):
            name = re.sub(r"\W+", "_", pattern.partition("[")[0].partition(".")[0]).strip("_") or "data"
            several = f"{name}_{task}" if len(_tasks(by_task)) > 1 else name
            found.append(FoundSource(_unused(several, found), pattern, task, by_task[task]))
    return found


def _pattern(path: Path) -> str:
    """Glob that stands for a shard and those that differ in its number: a-000003.tar -> a-[0-9]*.tar."""
    found = re.fullmatch(r"(.*?)\d+(-of-\d+)?", path.stem)
    name = f"{found[1]}[0-9]*{path.suffix}" if found else path.name
    return str(path.with_name(name))


def _unused(name: str, found: Sequence[FoundSource]) -> str:
    """The name, or the name with a number if another source has it."""
    taken = {one.name for one in found}
    names = (name, *(f"{name}_{number}" for number in range(2, len(taken) + 3)))
    return next(other for other in names if other not in taken)


def _index(shards: Sequence[Path], tokenizer: object, task: Task) -> Index | None:
    """The index of shards for a task, or None if no sample suits it."""
    try:
        return build_index(shards, tokenizer, task)  # type: ignore[arg-type]
    except UserError:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings about samples that do not suit a task that is only tried."""
    log = logging.getLogger(indexing.__name__)
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _tasks(by_task: dict[Task, Index]) -> list[Task]:
    """Tasks to train shards on: captioned pictures serve two, everything else the task that most samples suit."""
    counts = {task: len(index.documents) for task, index in by_task.items()}
    most = max(counts.values())
    if counts.get("t2i") == most and counts.get("i2t") == most:
        return ["t2i", "i2t"]
    return [next(task for task in (*_PREFERENCE, "t2i") if counts.get(task) == most)]


def measured(sources: Sequence[FoundSource], base: Config, side: int) -> Sizes:
    """Derive image sizes and the size of packs.

    Args:
        sources: with their indexes.
        base: the model, for strides and patches.
        side: longest side of images in pixels.
    """
    images = [image for one in sources for document in _some(one.index) for image in document.images]
    longer = sorted(max(image.height, image.width) for image in images) or [side]
    shorter = sorted(min(image.height, image.width) for image in images) or [side]
    long, short = longer[len(longer) * 95 // 100], shorter[len(shorter) * 5 // 100]
    stride, patch = base.model.latent_stride, base.model.vit.patch
    side = min(side, base.model.latent_grid * stride, base.model.vit.grid * patch)
    vae = _bounds(long, short, stride, (min(side, 512), side))
    vit = _bounds(long, short, patch, (min(side, VIT_SIDES[0]), min(side, VIT_SIDES[1])))
    data = replace(DataConfig(), vae_resize=vae, vit_resize=vit, drop_text=0.0, drop_vit=0.0, drop_latent=0.0)
    listed = tuple(SourceConfig(one.name, one.pattern, one.task) for one in sources)
    rules = Rules.of(replace(base, data=replace(data, sources=listed)))
    tokens, total = [], 0.0
    for one in sources:
        counted = [
            rules.visit(SampleKey(0, one.name, number, 0), document).size.tokens
            for number, document in enumerate(_some(one.index))
        ]
        tokens += counted
        total += len(one.index.documents) * sum(counted) / len(counted)
    tokens.sort()
    wanted = max(tokens[-1], 4 * tokens[len(tokens) // 2], 128)
    pack = min(-(-wanted // 128) * 128, MOST_TOKENS)
    return Sizes(vae, vit, pack, tokens[-1], max(1, round(total / (PACKS * pack * 15 / 16))))


PACKS = 4
"""`train.packs_per_step`."""


def _some(index: Index) -> list:  # type: ignore[type-arg]
    """At most LOOKED_AT documents, spread over the source."""
    step = -(-len(index.documents) // LOOKED_AT)
    return [index.documents[number] for number in range(0, len(index.documents), step)]


def _bounds(long: int, short: int, unit: int, most: tuple[int, int]) -> ResizeConfig:
    """Resize rule that leaves most pictures as they are, in multiples of `unit` pixels, within BAGEL's bounds."""
    largest = max(unit, min(-(-long // unit), most[1] // unit) * unit)
    smallest = max(unit, min(short // unit, most[0] // unit, largest // unit) * unit)
    return ResizeConfig(max_size=largest, min_size=smallest)


_SMALL = """\
model:               # a small model with random weights, for a first look; megabagel import-hf brings published ones
  layers: 4
  hidden: 128
  heads: 4
  kv_heads: 2
  ffn: 256
  vocab: {vocab}         # at least the ids of the tokenizer
  vit:
    layers: 2
    hidden: 96
    heads: 4
    ffn: 256
    grid: {vit_grid}         # patches of 14 pixels in the longest side
  latent_grid: {latent_grid}     # tokens of 16 pixels in the longest side
"""
_PUBLISHED = """\
base: {model}   # sizes of the model
"""


def _yaml(folder: Path, sources: Sequence[FoundSource], sizes: Sizes, tokenizer: str, weights: Path | None) -> str:
    """The text of the config."""
    most = max(len(one.index.documents) for one in sources)
    listed = "".join(
        f"    - {{name: {_word(one.name)}, path: {_word(one.pattern)}, task: {one.task}, "
        f"weight: {max(0.01, round(len(one.index.documents) / most, 2))}}}   # {len(one.index.documents):,} samples\n"
        for one in sources
    )
    vocab = -(-load_tokenizer(tokenizer).vocab_size // 128) * 128
    small = _SMALL.format(vocab=vocab, vit_grid=sizes.vit.max_size // 14, latent_grid=sizes.vae.max_size // 16)
    model = small if weights is None else _PUBLISHED.format(model=_word(str(weights / "model.yaml")))
    init = "" if weights is None else f"  init_from: {_word(str(weights))}\n"
    left_out = f"; longer ones are left out (the longest has {sizes.longest:,})" if sizes.longest > sizes.tokens else ""
    return f"""\
# Written by `megabagel init`. Every key: megabagel/config/schema.py; the file is read again at every start.

run:
  dir: {_word(f"runs/{folder.resolve().name or 'data'}")}
{init}
{model}
parallel:            # the product of tp, pp and cp divides the number of ranks; the rest is data parallel
  tp: 1
  pp: 1
  cp: 1
  chunk: {128 if sizes.tokens >= 2048 else 32}

data:
  root: {_word(str(folder))}
  tokenizer: {_word(tokenizer)}
  sources:           # samples are drawn in proportion to the weights
{listed}\
  min_tokens: {sizes.tokens * 7 // 8}    # a pack is closed at this size
  max_tokens: {sizes.tokens}    # and never exceeds this one{left_out}
  # Longest and shortest side in pixels, of pictures to generate and of pictures to look at:
  vae_resize: {{max_size: {sizes.vae.max_size}, min_size: {sizes.vae.min_size}}}
  vit_resize: {{max_size: {sizes.vit.max_size}, min_size: {sizes.vit.min_size}}}

train:
  steps: {max(100, sizes.steps_per_pass)}         # one pass over the data takes about {sizes.steps_per_pass:,}
  packs_per_step: {PACKS}
  precision: {"fp32" if weights is None else "bf16"}
  lr: {"1.0e-3" if weights is None else "2.5e-5"}
  warmup: {min(20, max(1, sizes.steps_per_pass // 10))}
  ema: 0.99          # 0.9999 for runs of many thousand steps

checkpoint:
  every: 50

telemetry:
  sample_every: 0    # with prompts: pictures during training
"""


def _word(text: str) -> str:
    """A text as a YAML value: as it stands where that is a text in YAML, else in double quotes, as in JSON."""
    plain = re.fullmatch(r"[A-Za-z/][\w./-]*", text, re.ASCII) and load_word(text) == text
    return text if plain else json.dumps(text)
