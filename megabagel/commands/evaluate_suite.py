"""`megabagel evaluate SUITE`: generate, judge and summarise, together or one stage at a time."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from megabagel.commands.words import positive, respawned
from megabagel.errors import UserError

NAMES = (
    *("shapes", "geneval", "wise", "t2i-compbench", "t2i-reasonbench"),
    *("gedit", "imgedit", "kris", "rise", "intelligentbench"),
    *("mme", "mmbench", "mmmu", "mm-vet", "mathvista", "mmvp"),
)
"""Suites (evaluation/suites/registry.py); listed here so that `--help` imports none of them."""
STAGES = ("generate", "judge", "summarise")


def add(suites: Any) -> None:
    """Declare a subcommand per suite."""
    for name in NAMES:
        parser = suites.add_parser(
            name,
            help="exact tasks on drawn pages" if name == "shapes" else f"the benchmark {name}",
            description=f"Evaluate CKPT with the suite {name} (docs/evaluation.md).",
            epilog=f"example: megabagel evaluate {name} runs/scenes --out results/{name}",
            allow_abbrev=False,
        )
        parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="run, checkpoint or published folder")
        parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of outputs and results")
        parser.add_argument("--limit", metavar="N", type=positive, help="only the first N items")
        parser.add_argument(
            "--every-checkpoint", action="store_true", help="of the run CKPT, each in a folder of its own"
        )
        parser.add_argument("--stage", choices=STAGES, action="append", help="only this stage; may be repeated")
        parser.add_argument("--json", action="store_true", help="print the summary instead of the table")
        _add_generation(parser)
        if name != "shapes":
            parser.add_argument("--data", metavar="PATH", type=Path, help="the benchmark's files (docs/evaluation.md)")
            _add_judge(parser)
        parser.set_defaults(run=_evaluate, suite=name)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation, instead of the suite's settings")
    group.add_argument("--weights", choices=("ema", "trained"), help="default: averaged ones where there are any")
    group.add_argument("--set", metavar="key=value", action="append", default=[], help="such as parallel.tp=2")
    group.add_argument("--steps", metavar="N", type=positive, help="grid points of the sampler: N - 1 evaluations")
    group.add_argument("--size", metavar="N", type=positive, help="side of pictures in pixels")
    group.add_argument("--samples", metavar="N", type=positive, help="pictures per prompt")
    group.add_argument("--think", action=argparse.BooleanOptionalAction, help="a thought before each output")
    group.add_argument("--cache-tokens", metavar="N", type=positive, default=32768, help="of the KV cache")
    group.add_argument("--nproc", metavar="N", type=positive, help="generate on N ranks: replicas of the grid")
    group.add_argument("--shard", metavar="I/N", type=_shard, default=(0, 1), help="job I of N that share DIR, from 0")


def _add_judge(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("judge")
    group.add_argument("--judge", metavar="KIND:PLACE", help="exact, endpoint:URL, model:CKPT or recorded:FILE")
    group.add_argument("--judge-model", metavar="NAME", default="", help="model of the endpoint")
    group.add_argument("--judge-timeout", metavar="S", type=float, default=120.0, help="seconds per request")
    group.add_argument(
        "--judge-rate", metavar="N", type=float, default=0.0, help="most requests per minute; 0: no limit"
    )
    group.add_argument("--judge-parallel", metavar="N", type=positive, default=4, help="requests at a time; default: 4")
    group.add_argument("--prices", metavar="IN,OUT", type=_prices, default=(0.0, 0.0), help="of a million tokens")
    group.add_argument("--record", metavar="FILE", type=Path, help="write the answers for --judge recorded:FILE")
    group.add_argument(
        "--templates", metavar="FILE", type=Path, help="JSON: questions by criterion, such as official ones"
    )
    group.add_argument(
        "--rule", choices=("published", "intended"), help="aggregation, where a released script is wrong"
    )


def _shard(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, found {text!r}")
    return int(found[1]), int(found[2])


def _prices(text: str) -> tuple[float, float]:
    try:
        asked, answered = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 2.5,10, found {text!r}") from error
    return asked, answered


def _evaluate(args: argparse.Namespace) -> int:
    stages = tuple(args.stage or (STAGES if args.shard[1] == 1 else STAGES[:1]))
    if args.nproc and "generate" in stages:
        code = respawned(args.nproc, ("--stage", "generate"))
        if code or stages == ("generate",):
            return code
        stages = tuple(stage for stage in stages if stage != "generate")
    from megabagel.runtime import cpu_backend

    cpu_backend.install()  # before anything imports megatron
    from megabagel.evaluation.checkpoints import checkpoints
    from megabagel.evaluation.generate import Settings
    from megabagel.evaluation.session import Work, generate_stage
    from megabagel.evaluation.suites.registry import suite_of
    from megabagel.runtime.launch_env import read_launch_env

    suite = suite_of(args.suite)
    size = (args.size, args.size) if args.size else None
    settings = Settings.of(suite, size=size, steps=args.steps, samples=args.samples, think=args.think)
    items = suite.read(getattr(args, "data", None))
    work = Work(
        *(suite, items, args.limit, settings, args.weights, tuple(args.set), args.cache_tokens, args.shard),
    )
    places = [(args.checkpoint, args.out)]
    if args.every_checkpoint:
        places = [(folder, args.out / folder.name) for folder in checkpoints(args.checkpoint, True)]
    if "generate" in stages:
        generate_stage(work, places)
    if read_launch_env()[0] == 0:
        _judge_and_summarise(args, work, stages, places)
    return 0


def _judge_and_summarise(args: argparse.Namespace, work: Any, stages: tuple[str, ...], places: Any) -> None:
    from megabagel.evaluation.judges.choose import choose_judge
    from megabagel.evaluation.run import TABLE
    from megabagel.evaluation.session import judge_stage, summarise_stage

    outs = [out for _, out in places]
    if "judge" in stages:
        parallel, judge = 1, None
        if args.suite != "shapes":
            judge = choose_judge(
                *(args.judge, work.suite.exact is not None, args.judge_model, args.judge_timeout),
                *(args.judge_rate, args.prices, args.record),
            )
            parallel = args.judge_parallel if (args.judge or "").startswith("endpoint:") else 1
        judge_stage(work, outs, judge, _templates(work.suite, getattr(args, "templates", None)), parallel)
    if "summarise" in stages:
        found = summarise_stage(work, outs, getattr(args, "rule", None) or work.suite.rules[0])
        for out, summary in zip(outs, found, strict=True):
            print(json.dumps(summary) if args.json else (out / TABLE).read_text(), flush=True)
        if args.every_checkpoint:
            from megabagel.evaluation.checkpoints import seen
            from megabagel.evaluation.emergence import write_emergence

            trained = [seen(checkpoint) for checkpoint, _ in places]
            print(write_emergence(args.out, found, trained, work.suite.headlines), flush=True)


def _templates(suite: Any, path: Path | None) -> dict[str, str]:
    """Texts of the questions: the suite's, or those of the user's file where it has them."""
    if path is None:
        return dict(suite.templates)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--templates {path}: {error}; expected a JSON object of texts") from error
    unknown = found.keys() - suite.templates.keys() if isinstance(found, dict) else {"it is no object"}
    if unknown or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"--templates {path}: {sorted(unknown)}; expected texts by {', '.join(suite.templates)}")
    return {**suite.templates, **found}
