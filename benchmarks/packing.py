"""The packer and the released one (docs/bagel.md#packing) on the same samples, simulated for many ranks.

    python benchmarks/packing.py [--real examples/configs/real.yaml] [--out benchmarks/results]

Sizes are either drawn (the seven sources and shares of examples/configs/bagel_7b_pt.yaml; texts log-normal, sides of
images uniform in 256 to 1600) or those of the data that --real names, in the window and image sizes of the same recipe.
The released rule counts a sample before conditioning dropout, ours after it; fill counts what is trained on. Work is
the estimated time of a pack beyond what all packs take (`sequence.flops.relative_time`). Nothing is decoded.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megabagel.config.load import load
from megabagel.config.schema import Config
from megabagel.data.builders.toy_shapes import ensure_dataset
from megabagel.data.documents import Document, ImageItem, Item, Member, TextItem, assign_roles
from megabagel.data.formats.reader import Reader
from megabagel.data.index.index import Index
from megabagel.data.plan.global_plan import GlobalPlan, Source, open_sources
from megabagel.data.plan.planned_sample import Rules
from megabagel.data.tokenize.tokenizer import load_tokenizer
from megabagel.sequence.flops import relative_time
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.layout import build_layout, layout_rows
from megabagel.sequence.pack import Pack
from megabagel.sequence.packing import turns
from megabagel.sequence.sample import Dropout
from megabagel.sequence.sizes import Size, total

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples/configs/bagel_7b_pt.yaml"
RANKS, CP = 64, 8
PER_RANK = (1, 6)
"""Packs of a step for each rank: one; and as in the recipe, 384 packs on 64 ranks."""
STEPS = 6
"""Of 384 packs."""
LAYOUTS = 48
"""Packs laid out over context-parallel ranks."""


def main() -> None:
    """Run every case and write packing.json and packing.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", type=Path, help="config of a run on real data, whose sources are taken")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of {RANKS * max(PER_RANK)} packs")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    config = recipe()
    cases = {"drawn sizes, shares of the pre-training recipe": (config, drawn_sources(config))}
    if args.real:
        real = load(args.real)
        ensure_dataset(real.data)
        data = replace(config.data, root=real.data.root, sources=real.data.sources, tokenizer=real.data.tokenizer)
        taken = replace(config, data=data)
        cases[f"sizes of the data of {args.real.name}"] = taken, open_sources(taken, load_tokenizer(data.tokenizer))
    found = {name: compare(*case, args.steps) for name, case in cases.items()}
    (args.out / "packing.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "packing.md").write_text(report(found))
    print(report(found))


def recipe() -> Config:
    """The pre-training recipe; its codec's file is not needed here."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as codec:
        config = load(RECIPE, [f"model.vae.path={codec.name}"])
    return replace(config, train=replace(config.train, packs_per_step=RANKS * max(PER_RANK)))


def drawn_sources(config: Config, count: int = 4000) -> list[Source]:
    """Sources whose samples have drawn sizes."""
    draws, sources = np.random.default_rng(0), []
    for source in config.data.sources:
        documents = tuple(
            assign_roles(source.task, Document(f"{number:06d}", tuple(drawn_items(source.task, draws))))
            for number in range(count)
        )
        index = Index(documents, (), source.name, Reader((), Path()))
        sources.append(Source(source.name, source.task, source.weight, index))
    return sources


def drawn_items(task: str, draws: np.random.Generator) -> Iterator[Item]:
    """Items of one sample; web documents have 3 to 8 images, clips 4 to 15 frames."""
    place = Member(0, 0, 0)

    def text(median: int) -> TextItem:
        return TextItem(max(1, round(draws.lognormal(np.log(median), 0.6))), place)

    def image() -> ImageItem:
        return ImageItem(*(int(side) for side in draws.integers(256, 1600, 2)), place)

    if task == "text":
        yield text(800)
    elif task in ("t2i", "i2t"):
        yield from (text(80), image())
    elif task == "edit":
        yield from (image(), text(30), image())
    elif task == "video":
        yield from (text(60), *[ImageItem(360, 640, place)] * int(draws.integers(4, 16)))
    else:
        for number in range(int(draws.integers(3, 9))):
            yield replace(text(100), role="target")
            yield replace(image(), role="target" if number else "condition")


@dataclass
class Packed:
    """Packs in the order in which they are made, and what became of the other samples."""

    packs: list[Size]
    lost: int = 0
    """Samples drawn that fit the limits and are in no pack and will be in none."""
    waiting: int = 0
    """Samples that would be lost if the run stopped here and went on."""


def official(config: Config, sources: Sequence[Source], packs: int, rank: int) -> Packed:
    """The released packer for one rank (docs/bagel.md#packing), on its own stream of samples.

    Length is estimated before dropout. Mandatory groups: the first source that generates and the first that looks.
    """
    data = config.data
    rules, whole = Rules.of(config), replace(Rules.of(config), dropout=Dropout())
    draws = np.random.default_rng([1, rank])
    weights = np.array([source.weight for source in sources])
    mandatory = list({s.task: s for s in reversed(sources) if s.task in ("t2i", "i2t")}.values())
    count = 0

    def sample(source: Source) -> tuple[int, Size]:
        nonlocal count
        count += 1
        number = int(draws.integers(len(source.index.documents)))
        key, document = SampleKey(rank, source.name, number, count), source.index.documents[number]
        return whole.visit(key, document).size.tokens, rules.visit(key, document).size

    result, buffer = Packed([]), list[tuple[int, Size]]()
    while len(result.packs) < packs:
        pack = [sample(source) for source in mandatory]
        while sum(length for length, _ in pack) < data.min_tokens:
            length = sum(length for length, _ in pack)
            buffered = length < PREFER_BUFFER_BEFORE and bool(buffer)
            entry = buffer.pop(0) if buffered else sample(draws.choice(sources, p=weights / weights.sum()))
            if entry[0] > (data.max_sample_tokens or data.max_tokens):
                continue
            if length + entry[0] <= data.max_tokens:
                pack.append(entry)
            elif not buffered and len(buffer) < MAX_BUFFER:
                buffer.append(entry)
            else:
                result.lost += 1
                break
        result.packs.append(total(size for _, size in pack))
    result.waiting = len(buffer)
    return result


PREFER_BUFFER_BEFORE, MAX_BUFFER = 16384, 50


def compare(config: Config, sources: list[Source], steps: int) -> dict[str, Any]:
    """Both packers on as many packs."""
    count = steps * config.train.packs_per_step
    streams = [official(config, sources, count // RANKS, rank) for rank in range(RANKS)]
    theirs = [stream.packs[number] for number in range(count // RANKS) for stream in streams]  # step by step
    plan = GlobalPlan(sources, config)
    started = time.process_time()
    planned = [plan.next_step() for _ in range(steps)]
    seconds = time.process_time() - started
    mine = [pack.size for step in planned for pack in step.packs]
    samples = sum(size.samples for size in theirs)
    layouts = [plan.lay_out(pack) for pack in planned[0].packs[:LAYOUTS]]
    lost = sum(stream.lost for stream in streams)
    return {
        "packs": count,
        "planned samples per core and second": sum(step.size.samples for step in planned) / seconds,
        "state bytes": len(json.dumps(planned[-1].state)),
        "released": {
            **summary(config, theirs),
            "lost": lost / (samples + lost),
            "lost at a restart": sum(stream.waiting for stream in streams),
            **{f"{n} a step": balance(config, theirs, n, in_order) for n in PER_RANK},
            "over cp": imbalance([area_contiguous(pack) for pack in layouts]),
        },
        "megabagel": {
            **summary(config, mine),
            "lost": 0.0,  # `tests/data/test_plan.py` shows that none is
            "lost at a restart": 0,
            **{f"{n} a step": balance(config, mine, n, dealt) for n in PER_RANK},
            "over cp": imbalance([area_laid_out(pack, config) for pack in layouts]),
        },
    }


def summary(config: Config, packs: Sequence[Size]) -> dict[str, Any]:
    """How full packs are."""
    tokens = np.array([size.tokens for size in packs])
    return {
        "samples": sum(size.samples for size in packs),
        "fill": float(tokens.mean() / config.data.max_tokens),
        "least": int(tokens.min()),
        "below min_tokens": float((tokens < config.data.min_tokens).mean()),
    }


Deal = Callable[[Config, Sequence[Size]], list[list[Size]]]
"""Packs of a step -> packs of every rank."""


def in_order(config: Config, packs: Sequence[Size]) -> list[list[Size]]:
    """Every rank runs what it packed itself."""
    return [list(packs[rank::RANKS]) for rank in range(RANKS)]


def dealt(config: Config, packs: Sequence[Size]) -> list[list[Size]]:
    """As `StepPlan.turns` deals them."""
    loads = [relative_time(size, config.model) for size in packs]
    return [[packs[number] for number in rank] for rank in zip(*turns(loads, RANKS), strict=True)]


def balance(config: Config, packs: Sequence[Size], per_rank: int, deal: Deal) -> dict[str, float]:
    """Largest over mean over the ranks of a step, averaged over steps: of work, und and gen tokens."""
    count = RANKS * per_rank
    steps = [deal(config, packs[start : start + count]) for start in range(0, len(packs), count)]
    ranks = [[total(rank) for rank in step] for step in steps]
    # A turn ends with its slowest rank where ranks wait for each other after every pack.
    at_once = [[[rank[turn] for rank in step] for turn in range(per_rank)] for step in steps]
    model = config.model
    return {
        "work": imbalance([[relative_time(size, model) for size in step] for step in ranks]),
        "work of a turn": imbalance(
            [[relative_time(size, model) for size in turn] for step in at_once for turn in step]
        ),
        "area": imbalance([[size.visible for size in step] for step in ranks]),
        "und": imbalance([[size.tokens - size.tokens_gen for size in step] for step in ranks]),
        "gen": imbalance([[size.tokens_gen for size in step] for step in ranks]),
    }


def imbalance(loads: Sequence[Sequence[float]]) -> float:
    """Largest over mean of every group, averaged."""
    return float(np.mean([max(group) / np.mean(group) for group in loads]))


def area_laid_out(pack: Pack, config: Config) -> list[int]:
    """(query, key) pairs of every context-parallel rank in the layout."""
    chunk = config.parallel.chunk
    layout = build_layout(pack, layout_rows(config.data.max_tokens, chunk, CP), chunk, CP)
    visible = np.append(pack.visible_S, 0)
    return [int(visible[layout.rank(rank)].sum()) for rank in range(CP)]


def area_contiguous(pack: Pack) -> list[int]:
    """The same where the sequence is cut in 2 x cp pieces, and rank r takes r and the r-th from the end: the usual deal
    for causal masks. The released trainer has no context parallelism."""
    pieces = [int(piece.sum()) for piece in np.array_split(pack.visible_S, 2 * CP)]
    return [pieces[rank] + pieces[-1 - rank] for rank in range(CP)]


def report(found: dict[str, Any]) -> str:
    """A table per case."""
    text = [f"# Packing: {RANKS} data-parallel ranks, alone and with {CP} context-parallel ranks each\n"]
    text.append(
        "Written by `benchmarks/packing.py`, whose head says what is simulated. Ratios are largest over mean.\n"
    )
    for name, case in found.items():
        rate, state = case["planned samples per core and second"], case["state bytes"]
        text.append(f"## {name}\n")
        text.append(
            f"{case['packs']} packs. One core planned {rate:,.0f} samples/s, {160_000 / rate:.0f} s for a step of "
            f"160,000; the plan's state is {state:,} bytes of JSON.\n"
        )
        text += ["| | released rule | MegaBAGEL |", "| --- | --- | --- |"]
        text += [f"| {label} | {cells[0]} | {cells[1]} |" for label, cells in rows(case)]
        text.append("")
    return "\n".join(text)


def rows(case: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """(what, [released, ours])."""
    both = [case["released"], case["megabagel"]]
    yield "fill of 36,864 rows", [f"{one['fill']:.1%}" for one in both]
    yield "packs below 32,768 tokens", [f"{one['below min_tokens']:.1%}" for one in both]
    yield "fewest tokens of a pack", [f"{one['least']:,}" for one in both]
    yield "samples lost", [f"{one['lost']:.2%}" for one in both]
    yield "samples lost at a restart", [f"{one['lost at a restart']:,}" for one in both]
    for number in PER_RANK:
        packs = f"{number} pack{'s' * (number > 1)} a rank and step"
        for part in ("work", "work of a turn", "area", "und", "gen"):
            yield f"{part}, {packs}", [f"{one[f'{number} a step'][part]:.3f}" for one in both]
    yield f"area over {CP} context-parallel ranks", [f"{one['over cp']:.3f}" for one in both]


if __name__ == "__main__":
    main()
