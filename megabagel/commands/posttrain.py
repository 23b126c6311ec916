"""`megabagel posttrain ...`: a model draws, its pictures are judged, and the scores become training records (SRUM)."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megabagel.commands.inference import model_options, picture_size, start
from megabagel.commands.words import positive


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the commands."""
    posttrain = commands.add_parser(
        "posttrain",
        help="let a model draw, judge and learn from its own pictures",
        description="SRUM: generate pictures, find regions, judge them, format training records. Every command goes on "
        "where it was stopped.",
        epilog="example: megabagel posttrain run examples/configs/srum_demo_pipeline.yaml",
        allow_abbrev=False,
    )
    group = posttrain.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(group)
    _add_boxes(group)
    _add_judge(group)
    _add_rest(group)
    _add_activations(group)


def _parser(commands: Any, name: str, what: str, example: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what.capitalize()}.",
        epilog=f"example: megabagel posttrain {example}",
        allow_abbrev=False,
    )
    parser.set_defaults(command=f"posttrain {name}")
    return parser


def _add_generate(commands: Any) -> None:
    draw = _parser(commands, "generate", "draw candidates for prompts", "generate runs/scenes scenes:96 runs/srum -n 2")
    draw.add_argument("checkpoint", metavar="CKPT", type=Path, help="run, checkpoint or published folder")
    draw.add_argument("prompts", metavar="PROMPTS", help=".jsonl, .txt or .json file, or scenes:COUNT")
    draw.add_argument("work", metavar="WORK", type=Path, help="folder of the pipeline")
    draw.add_argument("-n", metavar="N", type=positive, default=1, help="candidates per prompt; default: 1")
    draw.add_argument("--size", metavar="WxH", type=picture_size, help="pixels; default: largest trained square")
    draw.add_argument("--steps", metavar="N", type=positive, help="grid points of the sampler; default: 50")
    draw.add_argument("--text-scale", metavar="S", type=float, help="guidance; default: the preset's")
    draw.add_argument("--think", action="store_true", help="plan each picture in words first")
    draw.add_argument("--seed", metavar="N", type=int, default=0, help="default: 0")
    model_options(draw)
    draw.set_defaults(run=lambda args: start(args, _generate))


def _generate(args: argparse.Namespace, model: Any) -> int:
    from megabagel.posttrain.generate import DrawOptions, generate
    from megabagel.posttrain.prompts import read_prompts
    from megabagel.runtime.collective_errors import from_rank0

    prompts = from_rank0(lambda: read_prompts(args.prompts, args.seed))
    options = DrawOptions(args.n, args.size, args.steps, args.text_scale, args.think, args.seed)
    return _report(generate(model, prompts, args.work, options))


def _add_boxes(commands: Any) -> None:
    boxes = _parser(commands, "boxes", "find the regions of drawn pictures", "boxes runs/srum --method scenes")
    boxes.add_argument("work", metavar="WORK", type=Path, help="folder of the pipeline")
    boxes.add_argument(
        "--method", default="scenes", help="scenes, grid, sam, model, or a detector's address; default: scenes"
    )
    boxes.add_argument("--most", metavar="N", type=positive, default=10, help="boxes per picture; default: 10")
    boxes.add_argument("--cells", metavar="N", type=positive, default=2, help="grid: cells per side; default: 2")
    boxes.add_argument("--sam-weights", metavar="FILE", help="sam: sam_vit_h_4b8939.pth")
    boxes.add_argument("--keep-named", action="store_true", help="let the model drop boxes that the prompt lacks")
    _add_model(boxes)
    boxes.set_defaults(run=lambda args: _with_model(args, _boxes))


def _boxes(args: argparse.Namespace, model: Any) -> int:
    from megabagel.posttrain.boxes import BoxOptions, find_boxes

    options = BoxOptions(args.method, args.most, cells=args.cells, weights=args.sam_weights, keep_named=args.keep_named)
    return _report(find_boxes(args.work, options, model))


def _add_judge(commands: Any) -> None:
    judge = _parser(commands, "judge", "score drawn pictures", "judge runs/srum --by model --model runs/scenes")
    judge.add_argument("work", metavar="WORK", type=Path, help="folder of the pipeline")
    judge.add_argument("--by", choices=("exact", "scenes", "model"), default="exact", help="default: exact")
    judge.add_argument("--retries", metavar="N", type=int, default=2, help="for what has no score; default: 2")
    judge.add_argument("--overall", action="store_true", help="ask for a score of the whole picture too")
    judge.add_argument("--think", action="store_true", help="let the judge think first")
    judge.add_argument("--max-new-tokens", metavar="N", type=positive, default=1024, help="default: 1024")
    judge.add_argument("--seed", metavar="N", type=int, default=0, help="of retries; default: 0")
    _add_model(judge)
    judge.set_defaults(run=lambda args: _with_model(args, _judge))


def _judge(args: argparse.Namespace, model: Any) -> int:
    from megabagel.posttrain.judges import JudgeOptions
    from megabagel.posttrain.judging import judge

    options = JudgeOptions(args.by, args.retries, args.overall, args.think, args.max_new_tokens, args.seed)
    return _report(judge(args.work, options, model))


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", dest="checkpoint", metavar="CKPT", type=Path, help="the model to ask")
    model_options(parser)


def _with_model(args: argparse.Namespace, action: Any) -> int:
    return start(args, action) if args.checkpoint else int(action(args, None))


def _add_rest(commands: Any) -> None:
    form = _parser(commands, "format", "make training records of scores", "format runs/srum")
    form.add_argument("work", metavar="WORK", type=Path, help="folder of the pipeline")
    form.add_argument("--pairs", action="store_true", help="best candidate of a prompt as the others' second target")
    form.set_defaults(run=_format)
    show = _parser(commands, "show", "write a page of judged pictures", "show runs/srum --png runs/srum/shown")
    show.add_argument("work", metavar="WORK", type=Path, help="folder of the pipeline")
    show.add_argument("--config", metavar="CONFIG", type=Path, help="training config: reward rules, pixels per token")
    show.add_argument("--out", metavar="FILE.html", type=Path, help="default: WORK/show.html")
    show.add_argument("--most", metavar="N", type=positive, default=50, help="pictures; default: 50")
    show.add_argument("--png", metavar="FOLDER", type=Path, help="write a PNG per picture too")
    show.set_defaults(run=_show)
    run = _parser(commands, "run", "run all stages and training", "run examples/configs/srum_demo_pipeline.yaml")
    run.add_argument("plan", metavar="PLAN", type=Path, help="YAML file (docs/srum.md#pipeline)")
    run.set_defaults(run=_run)


def _add_activations(commands: Any) -> None:
    parser = _parser(
        commands,
        "activations",
        "compare models by the activation of their neuron clusters",
        "activations runs/scenes runs/sft_demo runs/srum_demo --tasks shapes:60 --out runs/activations",
    )
    parser.add_argument("checkpoint", metavar="BASE", type=Path, help="model that the clusters are found in")
    parser.add_argument("others", metavar="MODEL", type=Path, nargs="*", help="models that are compared with it")
    parser.add_argument("--tasks", metavar="TASKS", default="shapes:60", help="shapes:COUNT or FILE.jsonl")
    parser.add_argument("--percentile", metavar="P", type=float, default=90.0, help="of active neurons; default: 90")
    parser.add_argument("--size", metavar="WxH", type=picture_size, help="pixels; default: largest trained square")
    parser.add_argument("--steps", metavar="N", type=positive, default=25, help="grid points; default: 25")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of table and chart")
    model_options(parser)
    parser.set_defaults(run=lambda args: start(args, _activations))

    steps = _parser(
        commands,
        "steps",
        "score the picture that models head for at every sampling step",
        "steps runs/scenes runs/srum_demo --prompts scenes:30 --size 64x64 --out runs/steps",
    )
    steps.add_argument("checkpoint", metavar="BASE", type=Path, help="run, checkpoint or published folder")
    steps.add_argument("others", metavar="MODEL", type=Path, nargs="*", help="models that are compared with it")
    steps.add_argument("--prompts", metavar="PROMPTS", default="scenes:30", help="file or scenes:COUNT (default: 30)")
    steps.add_argument("--by", choices=("exact", "scenes", "model"), default="exact", help="judge; default: exact")
    steps.add_argument("--size", metavar="WxH", type=picture_size, help="pixels; default: largest trained square")
    steps.add_argument("--steps", metavar="N", type=positive, default=25, help="grid points; default: 25")
    steps.add_argument("--text-scale", metavar="S", type=float, help="guidance; default: the preset's")
    steps.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of table and charts")
    model_options(steps)
    steps.set_defaults(run=lambda args: start(args, _steps))


def _models(args: argparse.Namespace, base: Any) -> Iterator[tuple[str, Any]]:
    """The base model and the others by path, loaded one after another."""
    from megabagel.inference.api import Pipeline
    from megabagel.inference.load import open_source

    yield str(args.checkpoint), base
    for path in args.others:
        yield str(path), Pipeline(open_source(path, args.weights, tuple(args.set)), args.mesh, args.cache_tokens)


def _steps(args: argparse.Namespace, model: Any) -> int:
    from megabagel.posttrain.judges import JudgeOptions, judge_of
    from megabagel.posttrain.prompts import read_prompts
    from megabagel.posttrain.step_scores import step_scores, write_scores
    from megabagel.runtime.collective_errors import from_rank0

    prompts, options = from_rank0(lambda: read_prompts(args.prompts)), JudgeOptions(args.by, max_new_tokens=256)
    settings = {"size": args.size, "points": args.steps, "text_scale": args.text_scale}
    found = {name: step_scores(one, prompts, judge_of(options, one), **settings) for name, one in _models(args, model)}
    about = {"prompts": args.prompts, "count": len(prompts), "judge": args.by, "points": args.steps}
    print(from_rank0(lambda: write_scores(found, args.out, about)), end="")
    return 0


def _activations(args: argparse.Namespace, model: Any) -> int:
    from megabagel.posttrain import activations
    from megabagel.runtime.collective_errors import from_rank0

    samples = activations.samples_of(args.tasks)
    settings = activations.Settings(args.size, args.steps)
    means = {name: activations.task_means(one, args.mesh, samples, settings) for name, one in _models(args, model)}
    table = activations.compare(means, args.percentile)
    about = {"tasks": args.tasks, "samples": len(samples), "percentile": args.percentile, "steps": args.steps}
    print(from_rank0(lambda: activations.write_table(table, args.out, about)), end="")
    return 0


def _format(args: argparse.Namespace) -> int:
    from megabagel.posttrain.judging import format_records

    return _report(format_records(args.work, args.pairs))


def _show(args: argparse.Namespace) -> int:
    from megabagel.config.load import load
    from megabagel.config.schema import Config
    from megabagel.posttrain.show import show

    config = load(args.config) if args.config else Config()
    out = args.out or args.work / "show.html"
    shown = show(args.work, out, config.reward, config.model.latent_stride, args.most, args.png)
    print(f"{out}: {shown} pictures")
    return 0


def _run(args: argparse.Namespace) -> int:
    from megabagel.posttrain.plan import load_plan, run_plan

    return run_plan(load_plan(args.plan))


def _report(counts: Mapping[str, int]) -> int:
    print(", ".join(f"{name}: {count}" for name, count in counts.items()), flush=True)
    return 0
