"""Runs of recipes: counts, resume, failures, and bytes that do not depend on how the work was shared."""

import json
import os
from pathlib import Path

import pytest

from megabagel.cli import main
from megabagel.curation.engines.slurm import Slurm, in_turn
from megabagel.curation.output import Job
from megabagel.curation.partitions import Partition
from megabagel.curation.read.reader import reader_of
from megabagel.curation.recipe import checked
from megabagel.data.index.index import build_index, find_shards
from megabagel.data.tokenize.tokenizer import ByteTokenizer
from megabagel.errors import UserError
from megabagel.locks import claimed
from tests.curation.conftest import WEB, Inline, contents, curated
from tests.support.curation_pages import site


def with_steps(*steps: object, **more: object) -> dict[str, object]:
    return {**WEB, "steps": [*steps, *WEB["steps"]], "modules": ["tests.support.curation_steps"], **more}


def test_counts_and_samples(pages: Path, tmp_path: Path, inline: Inline) -> None:
    report = curated(WEB, pages, tmp_path)
    assert (report.partitions, report.documents, report.failed, report.read) == (4, 12, 0, {"page": 12})
    for tally in report.steps:
        tally.check()
    dropped = {tally.step: dict(tally.documents) for tally in report.steps if tally.documents}
    assert dropped == {"language": {"language de": 2}, "too_few_images": {"too few images": 3}}
    assert report.samples == 7 and report.steps[-1].pictures_out == 21

    index = build_index(find_shards(tmp_path / "shards", "web-*.tar"), ByteTokenizer(), "interleave")
    assert len(index.documents) == 7 and not index.skipped
    texts = [index.text(text) for text in index.documents[0].texts]
    assert texts[0].startswith("Page 0") and "Picture 0 of page 0" in texts[0]  # the caption comes first
    lines = [json.loads(line) for path in sorted((tmp_path / "provenance").iterdir()) for line in path.open()]
    assert [line["key"] for line in lines] == [document.key for document in index.documents]
    assert lines[0]["source"] == "part0/page00.html" and lines[0]["language"] == "en"
    assert lines[0]["notes"] == ["caption_first: 3 captions by alt"]


def test_a_second_run_does_nothing_and_a_lost_partition_comes_back(pages: Path, tmp_path: Path, inline: Inline) -> None:
    curated(WEB, pages, tmp_path)
    before, calls = contents(tmp_path), len(inline.got)
    assert calls == 3 * 4  # two steps with sketches, and the shards
    curated(WEB, pages, tmp_path)
    assert len(inline.got) == calls
    (tmp_path / "done" / "000002.json").unlink()
    (tmp_path / "shards" / "web-000002-000000.tar").write_bytes(b"half a sha")
    curated(WEB, pages, tmp_path)
    assert inline.got[calls:] == ["000002"] and contents(tmp_path) == before


def test_changed_input_is_done_again(tmp_path: Path, inline: Inline) -> None:
    pages = site(tmp_path / "in", 6)
    out = tmp_path / "out"
    curated(WEB, pages, out)
    inline.got.clear()
    page = pages / "part0" / "page00.html"
    page.write_text(page.read_text().replace("Page 0", "Another title"))
    curated(WEB, pages, out)
    # The sketches of its partition, and then everything that reads the tables.
    assert inline.got == ["000000", "000000", "000001", "000000", "000001"]
    assert b"Another title" in (out / "shards" / "web-000000-000000.tar").read_bytes()


@pytest.mark.parametrize("batch", [1, 5])
def test_a_document_that_raises_is_counted_and_named(pages: Path, tmp_path: Path, inline: Inline, batch: int) -> None:
    steps: list[object] = [{"raises_on": {"name": "page06"}}]
    report = curated(with_steps(*steps, batch=batch), pages, tmp_path)
    assert report.failed == 1 and report.documents == 12 and report.steps[0].documents_in == 11
    assert report.failures == (
        {"source": "part0/page06.html", "step": "raises_on", "error": "ZeroDivisionError: in part0/page06.html"},
    )
    assert report.samples == 6 and "page06.html: raises_on: ZeroDivisionError" in str(report)


def test_a_busy_partition_is_left_to_its_owner(pages: Path, tmp_path: Path, inline: Inline) -> None:
    recipe = checked({**WEB, "steps": []})
    job = Job(str(tmp_path), recipe, None)
    (first, second, *_) = reader_of("web").find([pages], pages_per_partition=3)
    with claimed(tmp_path / "locks" / "000000.lock", "test") as mine:
        assert mine and [outcome.status for outcome in inline.run(job, [first, second])] == ["busy", "done"]
    assert [outcome.status for outcome in inline.run(job, [first])] == ["done"]


def test_workers_and_a_partition_that_kills_them(pages: Path, tmp_path: Path) -> None:
    """With real processes: one partition kills two workers, is set aside, and costs nothing else."""
    recipe = {
        **WEB,
        "steps": [{"dies_on": {"name": "page07"}}, "too_few_images"],
        "modules": ["tests.support.curation_steps"],
    }
    report = curated(recipe, pages, tmp_path / "out", workers=2)
    assert report.partitions == 3 and report.documents == 9
    assert report.set_aside == ("000001 (part1/page01.html, ...)",) or "page07" in str(report.set_aside)
    assert "set aside after 2 dead workers" in str(report)
    deaths = [json.loads(line) for path in (tmp_path / "out" / "deaths").iterdir() for line in path.open()]
    assert [death["reason"] for death in deaths] == ["signal SIGKILL"] * 2


def test_bytes_do_not_depend_on_workers(
    pages: Path, tmp_path: Path, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    curated(WEB, pages, tmp_path / "one")
    monkeypatch.undo()
    curated(WEB, pages, tmp_path / "two", workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_slices_of_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    partitions = [Partition(str(number), "", ("x",), "") for number in range(5)]
    assert [p.name for p in in_turn(partitions, 1, 2)] == ["1", "3", "0", "2", "4"]
    assert [p.name for p in in_turn(partitions, 2, 3)] == ["2", "0", "3", "1", "4"]
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_COUNT": "3",
        "SLURM_ARRAY_TASK_MIN": "3",
        "SLURM_ARRAY_TASK_STEP": "2",
    }
    assert (Slurm(1, array).rank, Slurm(1, array).world) == (2, 3)
    with pytest.raises(UserError, match=r"no task of a job array.*curate.sbatch"):
        Slurm(1, {})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"steps": ["image_side"]}, r"steps\[0\]: 'image_side' is unknown; did you mean image_sides\?"),
        ({"steps": [{"image_sides": {"lest": 3}}]}, r"image_sides.lest: 'lest' is unknown; did you mean least\?"),
        ({"steps": [{"image_sides": {"least": "3"}}]}, r"image_sides.least: '3'; expected an integer"),
        ({"steps": [{"image_sides": {}, "english": {}}]}, "expected the name of a step, or one name with its options"),
        ({"read": {"kind": "wbe"}}, r"read.kind: 'wbe' is unknown; did you mean web\?"),
        ({"read": {}}, "read.kind: None is unknown"),
        ({"write": {"layout": "tarball"}}, "write.layout: 'tarball' is unknown"),
        ({"step": []}, r"step: 'step' is unknown; did you mean steps\?"),
        ({"name": "a/b"}, "name: 'a/b'; expected letters"),
        ({"batch": 0}, "expected at least 1"),
        ({"modules": ["no_such_module"]}, "modules: 'no_such_module' cannot be imported"),
        ({"steps": [{"caption_first": {"by": "model"}}]}, "caption_first asks a model.*no models.chat"),
    ],
)  # fmt: skip
def test_mistakes_in_a_recipe(change: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        checked({**WEB, **change})


def test_mistakes_in_folders(pages: Path, tmp_path: Path, inline: Inline) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such folder"):
        curated(WEB, tmp_path / "nothing", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pages in it"):
        curated(WEB, tmp_path / "empty", out)
    curated(WEB, pages, out)
    with pytest.raises(UserError, match=r"holds the output of another recipe \(other steps\)"):
        curated({**WEB, "steps": WEB["steps"][:-1]}, pages, out)
    fewer = site(tmp_path / "fewer", 3)
    with pytest.raises(UserError, match="holds 3 partitions that this input lacks, first 000001"):
        curated(WEB, fewer, out)


def test_a_disk_that_fails_leaves_nothing_half(
    pages: Path, tmp_path: Path, inline: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megabagel.curation import worker

    real = worker.write_shards

    def full(*arguments: object) -> object:
        real(*arguments)  # type: ignore[arg-type]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(worker, "write_shards", full)
    with pytest.raises(UserError, match=r"partition 000000: .*No space left"):
        curated(WEB, pages, tmp_path)
    assert not list(tmp_path.glob("shards/*")) and not list(tmp_path.glob("done/*"))
    monkeypatch.setattr(worker, "write_shards", real)
    assert curated(WEB, pages, tmp_path).samples == 7 and not list((tmp_path / "staging").iterdir())


def test_commands(pages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inline: Inline) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text("read: {kind: web}\nsteps: [too_few_images, {language: {keep: [en]}}]\n")
    out = tmp_path / "out"
    assert main(["curate", "run", str(recipe), "--in", str(pages), "--out", str(out)]) == 0
    assert "samples: 7" in capsys.readouterr().out
    assert main(["curate", "report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["documents_dropped"] == {"too few images": 3}
    assert main(["curate", "show", str(out), "--samples", "2"]) == 0
    page = (out / "show.html").read_text()
    assert page.count("<section>") == 2 and page.count("data:image/jpeg") == 6 and "language: language de" in page
    assert main(["curate", "report", str(tmp_path)]) == 2
    assert "no recipe.json in it" in capsys.readouterr().err
    recipe.write_text("steps: [nonsense]\nread: {kind: web}\n")
    assert main(["curate", "run", str(recipe), "--in", str(pages), "--out", str(out)]) == 2
    assert f"{recipe}: steps[0]: 'nonsense' is unknown" in capsys.readouterr().err


@pytest.mark.thorough
def test_kills_at_any_moment_leave_equal_bytes(pages: Path, tmp_path: Path, inline: Inline) -> None:
    import signal
    import subprocess
    import sys
    import time

    curated(WEB, pages, tmp_path / "whole")
    recipe = tmp_path / "web.yaml"
    recipe.write_text(json.dumps(WEB))
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "megabagel",
        "curate",
        "run",
        recipe,
        "--in",
        pages,
        "--out",
        out,
        "--workers",
        "2",
    ]
    for moment in range(10):
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(1.0 + 0.3 * moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert contents(out) == contents(tmp_path / "whole")
