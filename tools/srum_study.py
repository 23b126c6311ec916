"""SRUM against fine-tuning on the same own pictures, with its ablations, over seeds, on held-out prompts.

    python tools/srum_study.py BASE WORK OUT [--seeds 0 1 2] [--only srum sft] [--set train.steps=60]

BASE is a run of examples/configs/scenes.yaml, WORK a folder of `megabagel posttrain` with `train.jsonl`. Every variant
starts from BASE's newest checkpoint, trains for the same steps with the same draws, and is scored by the exact checker
on the held-out prompts and questions of the suite `shapes`. Finished runs and scores are kept, so the study goes on
where it was stopped. OUT/table.md has the shares over all seeds with 95 % intervals (Wilson).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from megabagel.evaluation.charts import markdown_table
from megabagel.evaluation.intervals import proportion
from megabagel.evaluation.shapes_suite import check, page_of, shapes_suite
from megabagel.journal import write_whole

CONFIGS = Path(__file__).resolve().parents[1] / "examples" / "configs"
VARIANTS: dict[str, tuple[str, ...]] = {
    "sft": ("sft_demo.yaml",),
    "srum": ("srum_demo.yaml",),
    "srum, rule paper": ("srum_demo.yaml", "reward.rule=paper"),
    "sample level": ("srum_demo.yaml", "reward.level=picture"),
    "binary": ("srum_demo.yaml", "reward.binary=true"),
    "no layout": ("srum_demo.yaml", "reward.use_layout=false"),
    "lambda 0": ("srum_demo.yaml", "reward.constraint=0"),
}
"""Config and overrides of each; SRUM figure 3 names the ablations."""
DRAWN, ASKED, SEED = 120, 60, 0
"""Held-out prompts and questions, and the seed of their pictures."""


def trained(base: Path, work: Path, run: Path, words: tuple[str, ...], seed: int, more: list[str]) -> None:
    """Train a variant unless its run is finished."""
    if (run / "checkpoints" / "latest").is_file():
        return
    newest = base / "checkpoints" / (base / "checkpoints" / "latest").read_text().strip()
    settings = [
        f"run.dir={run}",
        f"run.init_from={newest}",
        f"data.root={work}",
        f"train.seed={seed}",
        *words[1:],
        *more,
    ]
    command = [sys.executable, "-m", "megabagel", "train", str(CONFIGS / words[0]), *settings, "--nproc", "2"]
    with (run.parent / f"{run.name}.log").open("w") as log:
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log, check=True)


def scored(run: Path, out: Path) -> dict[str, list[int]]:
    """[right, all] by ability of the model in `run`."""
    if out.is_file():
        return dict(json.loads(out.read_text()))
    import megabagel

    model = megabagel.load_pretrained(run)
    items = [item for item in shapes_suite(SEED, DRAWN) if item["ability"] == "draw"]
    items += [item for item in shapes_suite(SEED, ASKED) if item["ability"] == "ask"]
    requests = []
    for number, item in enumerate(items):
        page = page_of(item, 64)
        if item["ability"] == "draw":
            settings: dict[str, Any] = {"size": (64, 64), "points": 25, "text_scale": 2.0, "seed": number}
            requests.append(model.submit_draw([item["prompt"]], **settings))
        else:
            shown = [] if page is None else [Image.fromarray(page)]
            requests.append(model.submit_answer([*shown, item["prompt"]], max_new_tokens=32))
    while any(request.done is None for request in requests):
        model.engine.step()
    found: dict[str, list[int]] = {"draw": [0, 0], "ask": [0, 0]}
    for item, request in zip(items, requests, strict=True):
        result = request.done.result
        output = result[0].pixels if item["ability"] == "draw" else model.tokenizer.decode(result)
        found[item["ability"]][0] += bool(check(item, output)["correct"])
        found[item["ability"]][1] += 1
    write_whole(out, json.dumps(found) + "\n")
    return found


def table(shares: dict[str, dict[int, dict[str, list[int]]]]) -> str:
    """Markdown of right shares by variant, over its seeds."""
    rows = []
    for name, by_seed in shares.items():
        row = [name]
        for ability in ("draw", "ask"):
            right, count = (sum(found[ability][k] for found in by_seed.values()) for k in (0, 1))
            estimate = proportion(right, count)
            each = ", ".join(f"{found[ability][0] / found[ability][1]:.3f}" for found in by_seed.values())
            row += [f"{right / count:.3f} ({estimate.low:.3f}-{estimate.high:.3f})", each]
        rows.append(row)
    return markdown_table(["model", "held-out drawings right", "by seed", "questions right", "by seed"], rows)


def main() -> None:
    """Train, score, and write the table after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--set", nargs="+", default=[], help="overrides of every run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    shares = {"base": {0: scored(args.base, args.out / "base.json")}}
    for seed in args.seeds:
        for name in args.only:
            run = args.out / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}"
            trained(args.base, args.work, run, VARIANTS[name], seed, args.set)
            shares.setdefault(name, {})[seed] = scored(run, args.out / f"{run.name}.json")
            write_whole(args.out / "table.md", table(shares))
            print(table(shares), flush=True)


if __name__ == "__main__":
    main()
