"""Commands `generate`, `edit`, `ask` and `chat` on a tiny published model: files, lines, one message per mistake."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.inference_command import Outcome, command, tiny_model
from tests.support.rank_pool import RankPool

DOCUMENT = Path(__file__).parents[2] / "docs" / "inference.md"
FEW = ("--steps", "3")


class Bench:
    """The model, a folder for pictures, and a way to run commands there."""

    def __init__(self, ranks: RankPool, folder: Path) -> None:
        self.ranks, self.folder, self.model = ranks, folder, tiny_model(folder / "model")
        self.pictures = folder / "pictures"
        self.pictures.mkdir()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(folder / "in.png")

    def run(self, *words: object, stdin: str = "", fails: bool = False) -> Outcome:
        (outcome,) = self.ranks.run(1, command, words, stdin, self.folder)
        assert (outcome.code != 0) == fails, outcome
        return outcome

    def draw(self, *words: object, verb: str = "generate") -> list[Path]:
        """Pictures that a command printed."""
        return [self.folder / line for line in self.run(verb, self.model, *words, *FEW, "--out", "pictures").lines]

    def message(self, *words: object) -> str:
        """The one message of a command that is refused."""
        outcome = self.run(*words, fails=True)
        assert outcome.code == 2 and outcome.out == ""
        lines = outcome.err.splitlines()
        errors = [number for number, line in enumerate(lines) if ": error: " in line]
        assert len(errors) == 1, outcome.err  # argparse prints how to call it before, the config's problems come after
        return "\n".join(lines[errors[0] :])


@pytest.fixture(scope="module")
def bench(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(ranks, tmp_path_factory.mktemp("bench"))


def levels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def about(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["megabagel"])


def test_a_command_repeats_its_files_byte_for_byte(bench: Bench) -> None:
    (first,) = bench.draw("a red circle", "--size", "48x32")
    made = first.read_bytes()
    (second,) = bench.draw("a red circle", "--size", "48x32")
    assert second.name == "generate_seed0.png" and second.read_bytes() == made
    assert levels(second).shape == (32, 48, 3) and levels(second).std() > 5
    found = about(second)
    assert found["settings"]["points"] == 3 and found["evaluations"] == 2 and found["items"] == ["a red circle"]
    assert str(bench.folder) not in json.dumps(found)
    (other,) = bench.draw("a blue circle", "--size", "48x32")
    assert not np.array_equal(levels(other), levels(first)) or other.read_bytes() != made


def test_seeds_follow_each_other_and_pictures_do_not_depend_on_their_neighbours(bench: Bench) -> None:
    many = bench.draw("a circle", "-n", "3", "--seed", "5")
    assert [path.name for path in many] == [f"generate_seed{seed}.png" for seed in (5, 6, 7)]
    assert len({path.read_bytes() for path in many}) == 3
    middle = many[1].read_bytes()
    (alone,) = bench.draw("a circle", "--seed", "6")
    assert alone.read_bytes() == middle
    sheet = levels(bench.pictures / "generate_sheet.png")
    assert sheet.shape[0] >= 64 and sheet.shape[1] >= 3 * 64


def test_from_repeats_a_picture(bench: Bench) -> None:
    (made,) = bench.draw("a circle", "--seed", "9", "--preset", "gradio", "--text-scale", "3", "--think")
    assert about(made)["thought"] and about(made)["preset"] == "gradio"
    before, again = made.read_bytes(), bench.folder / "again"
    again.mkdir()
    outcome = bench.run("generate", bench.model, "--from", made, "--out", again)
    assert Path(outcome.lines[0]).read_bytes() == before
    (edited,) = bench.draw("in.png", "make it blue", "--seed", "2", verb="edit")
    outcome = bench.run("edit", bench.model, "in.png", "--from", edited, "--out", again)
    assert Path(outcome.lines[0]).read_bytes() == edited.read_bytes()
    refused = bench.message("edit", bench.model, made, "--from", edited, "--out", again)
    assert "was made from other input images" in refused


def test_an_edit_has_the_size_of_its_last_image_and_depends_on_all(bench: Bench) -> None:
    (one,) = bench.draw("in.png", "make it blue", verb="edit")
    assert about(one)["preset"] == "edit" and levels(one).shape == (48, 64, 3)  # 50 x 40 pixels, resized
    first = levels(one)
    (two,) = bench.draw(one, "in.png", "make it blue", verb="edit")
    assert levels(two).shape == first.shape and not np.array_equal(levels(two), first)
    assert len(about(two)["items"]) == 3


def test_json_lines_hold_everything(bench: Bench) -> None:
    outcome = bench.run("generate", bench.model, "a circle", "-n", "2", *FEW, "--json", "--out", "pictures")
    found = [json.loads(line) for line in outcome.lines]
    assert [one["seed"] for one in found] == [0, 1]
    assert {**about(bench.folder / found[1]["path"]), "path": found[1]["path"]} == found[1]
    outcome = bench.run("ask", bench.model, "in.png", "what?", "--max-new-tokens", "5", "--json")
    (line,) = outcome.lines
    assert json.loads(line)["question"] == "what?" and json.loads(line)["tokens"] <= 5


def test_an_answer_is_printed_as_it_is_decoded(bench: Bench) -> None:
    words = ("ask", bench.model, "in.png", "what is it?", "--max-new-tokens", "8")
    plain = bench.run(*words).out
    assert plain == bench.run(*words).out
    assert plain.rstrip("\n") == json.loads(bench.run(*words, "--json").out)["answer"]
    thought = json.loads(bench.run(*words, "--think", "--json").out)
    assert thought["tokens"] and thought["answer"] != plain.rstrip("\n")
    drawn = [bench.run(*words, "--temperature", "1", "--seed", seed, "--json").out for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_dialogue_goes_on_after_a_mistake(bench: Bench) -> None:
    lines = "hello\n/show in.png\n/show absent.png\n\n/image a circle\nwhat is it?\n/quit\nnot read\n"
    options = ("--max-new-tokens", "4", *FEW, "--json", "--out", "pictures")
    outcome = bench.run("chat", bench.model, *options, stdin=lines)
    first, picture, last = map(json.loads, outcome.lines)
    assert "answer" in first and "answer" in last and picture["settings"]["points"] == 3
    assert (bench.folder / picture["path"]).exists()
    assert outcome.err.splitlines()[-1].startswith("megabagel: absent.png: cannot be read")
    again = bench.run("chat", bench.model, *options, stdin=lines)
    assert again.out == outcome.out


@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_other_variants_draw_and_answer(bench: Bench, variant: str) -> None:
    folder = tiny_model(bench.folder / variant, variant)
    bench.run("generate", folder, "a circle", *FEW, "--out", "pictures")
    bench.run("ask", folder, "in.png", "what?", "--max-new-tokens", "3")


def test_an_imported_checkpoint_has_no_averaged_weights(bench: Bench) -> None:
    (published,) = bench.draw("a circle", "--seed", "3")
    expected = levels(published)
    bench.run("import-hf", bench.model, "imported")
    outcome = bench.run("generate", "imported", "a circle", "--seed", "3", *FEW, "--out", "pictures", "--json")
    made = json.loads(outcome.lines[0])
    assert made["weights"] == "trained" and np.array_equal(levels(bench.folder / made["path"]), expected)
    refused = bench.message("generate", "imported", "a circle", "--weights", "ema")
    assert "imported: holds no averaged weights" in refused and "use trained ones" in refused
    other = bench.message("generate", bench.model, "--from", bench.folder / made["path"])
    assert "was made by other weights" in other


MISTAKES = {
    ("generate",): "no prompt; expected PROMPT or --from FILE.png",
    ("generate", "x", "--from", "in.png"): "--from repeats a picture with its own prompt",
    ("generate", "--from", "in.png"): "in.png: holds no settings of a generated picture",
    ("generate", "x", "--size", "40x48"): "size 40x48: expected multiples of 16 pixels",
    ("generate", "x", "--size", "80x64"): "size 80x64: the model's latent grid ends at 64 pixels per side",
    ("generate", "x", "--size", "64"): "expected WIDTHxHEIGHT such as 1024x576, found '64'",
    ("generate", "x", "--preset", "best"): "preset 'best': expected one of notebook",
    ("generate", "x", "--renorm", "local"): "cfg_renorm_type='local': expected one of global",
    ("generate", "x", "--renorm-min", "2"): "cfg_renorm_min=2.0",
    ("generate", "x", "--interval", "0"): "expected two numbers such as 0.4,1",
    ("generate", "x", "--steps", "0"): "--steps",
    ("generate", "x", "--shift", "0"): "shift=0.0: expected a number above 0",
    ("generate", "x", "--out", "in.png"): "--out in.png: cannot be made (File exists); name a folder",
    ("generate", "x", "--weights", "ema"): "a published folder holds one set of weights",
    ("generate", "x" * 500, "--cache-tokens", "512"): "tokens of KV cache, the cache has 512: shorten the prompt",
    ("generate", "x", "--set", "parallel.vpp=2"): "parallel.vpp = 2, parallel.pp = 1: Model chunks",
    ("edit", "make it blue"): "expected at least one image, then the instruction",
    ("edit", "absent.png", "blue"): "absent.png: cannot be read",
    ("edit", "model/llm_config.json", "blue"): "llm_config.json:",
    ("ask", "in.png", "x", "--top-p", "0"): "top_p=0.0",
    ("ask", "x", "--temperature", "-1"): "temperature=-1.0",
    ("ask", "x", "--max-new-tokens", "none"): "--max-new-tokens",
}


@pytest.mark.parametrize("words", MISTAKES, ids=lambda words: " ".join(words)[:40])
def test_a_mistake_gets_one_message(bench: Bench, words: tuple[str, ...]) -> None:
    verb, *rest = words
    assert MISTAKES[words] in bench.message(verb, bench.model, *rest)


def test_a_folder_without_a_model_is_named(bench: Bench) -> None:
    assert "pictures: no model there" in bench.message("ask", "pictures", "x")
    assert "absent: no such folder" in bench.message("ask", "absent", "x")


def test_ranks_that_no_grid_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As started by `--nproc 2` without a grid: refused before the ranks meet."""
    from megabagel.cli import main

    tiny_model(tmp_path / "model")
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    says = io.StringIO()
    monkeypatch.setattr("sys.stderr", says)
    assert main(["ask", str(tmp_path / "model"), "why?"]) == 2
    assert "ask: 2 ranks for a model on tp 1 x pp 1 x cp 1; expected 1, or another grid" in says.getvalue()
    assert "--set parallel.tp=2 --nproc 2" in says.getvalue()


def documented() -> list[list[str]]:
    (block,) = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return [shlex.split(line.split("  #")[0])[1:] for line in block.splitlines()]


def test_the_commands_of_the_document_run(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    tiny_model(tmp_path / "runs" / "demo")
    for name in ("pictures", "again"):
        (tmp_path / name).mkdir()
    ran = [words for words in documented() if "--nproc" not in words]
    assert {words[0] for words in ran} == {"generate", "edit", "ask", "chat"}
    for words in ran:
        (outcome,) = ranks.run(1, command, words, "hello\n/quit\n", tmp_path)
        assert outcome.code == 0, outcome.err
    assert (tmp_path / "again/generate_seed2.png").read_bytes() == (
        tmp_path / "pictures/generate_seed2.png"
    ).read_bytes()
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    ranks.run(1, python, block, tmp_path)
    assert (tmp_path / "circle.png").exists()


def python(code: str, folder: Path) -> None:
    """Run the code of a document."""
    import os

    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, str(DOCUMENT), "exec"), {})
    finally:
        os.chdir(before)
