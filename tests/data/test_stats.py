"""Counts of the plan beside counts over its packs, laid out token by token."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from megabagel.cli import main
from megabagel.config.schema import Config
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.plan.planned_sample import Rules
from megabagel.data.stats import Tokens, count_steps
from megabagel.sequence.sample import LATENT, TEXT, VIT
from tests.support.small_run import small_config, sources_of

STEPS = 7


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    return small_config(shapes)


def test_counts_are_those_of_the_packs(config: Config) -> None:
    sources = sources_of(config)
    stats = count_steps(config, sources, STEPS)
    plan, rules = GlobalPlan(sources, config), Rules.of(config)
    samples: Counter[str] = Counter()
    tokens: dict[str, Counter[str]] = {name: Counter() for name in stats.sources}
    fills = []
    for _ in range(STEPS):
        for planned in plan.next_step().packs:
            pack = rules.pack(planned, [plan.document(visit.key) for visit in planned.visits])
            fills.append(pack.tokens / 128)
            for sample in pack.samples:
                samples[sample.key.source] += 1
                loss = int(sample.ce_S.sum())
                noised = sum(image.rows * image.cols for image in sample.latents if image.noised)
                tokens[sample.key.source].update(
                    text=int((sample.kind_S == TEXT).sum()) - loss,
                    text_loss=loss,
                    vit=int((sample.kind_S == VIT).sum()),
                    clean_latents=int((sample.kind_S == LATENT).sum()) - noised,
                    noised_latents=noised,
                )
    assert {name: source.samples for name, source in stats.sources.items()} == samples
    assert {name: source.tokens for name, source in stats.sources.items()} == {
        n: Tokens(**c) for n, c in tokens.items()
    }
    assert stats.fills == tuple(fills) and len(fills) == STEPS * 4
    everything = sum(tokens.values(), Counter())
    assert stats.tokens == Tokens(**everything)
    gen = everything["clean_latents"] + everything["noised_latents"]
    assert stats.und_per_gen == (everything.total() - gen) / gen
    assert min(everything.values()) > 0  # every type of token occurs
    for name, (epoch, place) in plan.cursors.items():
        assert stats.sources[name].epochs == epoch + place / len(plan.sources[name].index.documents)


def test_images_are_counted_by_what_a_sample_shows(config: Config) -> None:
    only = replace(config, data=replace(config.data, sources=config.data.sources[:2]))
    stats = count_steps(only, sources_of(only), STEPS)
    assert all(source.images == source.samples > 0 for source in stats.sources.values())
    text = replace(config, data=replace(config.data, sources=config.data.sources[4:]))
    stats = count_steps(text, sources_of(text), 1)
    assert stats.sources["notes"].images == 0 and stats.und_per_gen is None and "all und" in str(stats)


def test_samples_that_cannot_be_used_are_counted_by_reason(config: Config) -> None:
    tight = replace(config, data=replace(config.data, max_sample_tokens=60))
    sources = sources_of(tight)
    stats = count_steps(tight, sources, STEPS)
    plan = GlobalPlan(sources, tight)
    for _ in range(STEPS):
        plan.next_step()
    found = {f"{n}: {reason}": k for n, s in stats.sources.items() for reason, k in s.left_out.items()}
    assert found == plan.skipped and "edit: longer than the window" in found
    assert f"edit: {found['edit: longer than the window']} drawn and left out, longer than the window" in str(stats)


def test_the_command_prints_a_table_or_json(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The third note is empty: the index skips it."""
    tree = {
        "data": {
            "root": str(shapes),
            "sources": [
                {"name": "draw", "path": "scenes-*.tar", "task": "t2i"},
                {"name": "wrong", "path": "*s-000000.tar", "task": "text"},
            ],
            "vae_resize": {"max_size": 64, "min_size": 32},
        }
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    words = ["data", "stats", str(tmp_path / "run.yaml"), "--steps", "3", "train.packs_per_step=2"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["packs"]) == (3, 6) and set(found["sources"]) == {"draw", "wrong"}
    assert found["sources"]["wrong"]["skipped"]["text: has images"] == 105  # 60 scenes, 30 edits, 15 clips
    assert main(words) == 0
    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("draw"))
    counts = found["sources"]["draw"]["tokens"]
    assert [int(cell.replace(",", "")) for cell in line.split()[4:10]] == [*counts.values(), sum(counts.values())]
    assert "wrong: 105 skipped by the index, text: has images" in table
