"""`megabagel posttrain run`: commands of all rounds, and plans that are refused."""

from pathlib import Path

import pytest

from megabagel.cli import _parser
from megabagel.errors import UserError
from megabagel.posttrain import plan as module
from megabagel.posttrain.plan import commands, load_plan, run_plan

EXAMPLES = Path(__file__).parents[2] / "examples" / "posttrain"

TWO_ROUNDS = """
work: {work}
model: {model}
rounds: 2
generate: {{prompts: "scenes:8", size: [64, 48], steps: 5, think: true, set: [parallel.tp=2], nproc: 2}}
boxes: {{method: model}}
judge: {{by: scenes}}
pairs: true
train: {{config: t.yaml, set: [train.steps=3]}}
"""


def written(folder: Path) -> Path:
    (folder / "plan.yaml").write_text(TWO_ROUNDS.format(work=folder / "work", model=folder / "base"))
    return folder / "plan.yaml"


def test_every_command_can_be_parsed_and_a_round_uses_the_model_of_the_last(tmp_path: Path) -> None:
    latest = tmp_path / "base" / "checkpoints" / "latest"
    latest.parent.mkdir(parents=True)
    latest.write_text("step_00000007\n")
    found = list(commands(load_plan(written(tmp_path))))
    assert [words[1] if words[0] == "posttrain" else words[0] for words in found] == [
        "generate", "boxes", "judge", "format", "show", "train"
    ] * 2  # fmt: skip
    for words in found:
        _parser().parse_args(words)
    first, second = found[0], found[6]
    assert first[2] == str(tmp_path / "base") and second[2] == str(tmp_path / "work" / "round_1" / "run")
    assert "--seed=0" in first and "--seed=1" in second and "--set=parallel.tp=2" in first and "--nproc=2" in first
    assert f"run.init_from={latest.parent / 'step_00000007'}" in found[5]
    assert "--pairs" in found[3] and f"--model={tmp_path / 'base'}" in found[2]


def test_examples_are_plans() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        plan = load_plan(path)
        assert Path(plan.train.config).is_file()
        for words in commands(plan):
            _parser().parse_args(words)


def test_a_failing_stage_ends_the_run_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[list[str]] = []

    class Ended:
        returncode = 0

    def run(words: list[str], **_: object) -> Ended:
        begun.append(words[3:])
        Ended.returncode = 74 if "judge" in words else 0
        return Ended()

    monkeypatch.setattr(module.subprocess, "run", run)
    assert run_plan(load_plan(written(tmp_path))) == 74
    assert [words[1] for words in begun] == ["generate", "boxes", "judge"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("work: a\nmodel: b", "name the config of"),
        ("model: b\ntrain: {config: c}", "work = '': name one"),
        ("work: a\nmodel: b\ntrain: {config: c}\nrounds: 0", "rounds = 0: expected at least 1"),
        ("work: a\nmodel: b\ntrain: {config: c}\njudge: {by: gpt}", "judge.by"),
        ("work: a\nwork: b", "cannot be read"),
        ("- a", "expected a mapping"),
    ],
)
def test_bad_plans(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_plan(tmp_path / "plan.yaml")
