"""Packs filled by worker processes: the same batches as a thread's, and an end with a name when one fails."""

import multiprocessing
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from megabagel.config.schema import Config
from megabagel.data.documents import ImageItem
from megabagel.data.load.collate import Filler
from megabagel.data.load.loader import Loader, Step
from megabagel.data.plan.planned_sample import PackPlan
from megabagel.errors import TransientFailure, UserError
from megabagel.sequence.batch import BatchBuilder
from megabagel.sequence.images import vae_images, vit_images
from megabagel.sequence.rank_rows import RankPlace
from tests.data.test_loader import loader, only
from tests.support.batches import assert_same
from tests.support.config_tree import change
from tests.support.small_run import small_config
from tests.support.worker_tasks import Stumbling, plan_codes


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    return small_config(shapes)


@pytest.fixture(autouse=True)
def nobody_stays() -> Iterator[None]:
    """Workers end with the steps. Other tests of this process may keep processes of their own."""
    others = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= others


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may harm."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def test_batches_do_not_depend_on_who_fills_them(config: Config) -> None:
    """A thread, or 1 to 4 workers: the same batches, bit for bit, with attention plans made where packs are filled."""
    settings = change(config, {"data.prefetch": 3})
    planning = BatchBuilder(settings, RankPlace(), plan_codes)
    expected = list(loader(settings, planning, dp=(1, 2)).steps(4))
    assert all(batch.plans.layers[0].queries > 0 for step in expected for batch in step.batches)
    for workers in (1, 4):
        made = loader(change(settings, {"data.workers": workers}), planning, dp=(1, 2))
        found = list(made.steps(4))
        assert [step.plan for step in found] == [step.plan for step in expected]
        for one, two in zip(expected, found, strict=True):
            for batch, other in zip(one.batches, two.batches, strict=True):
                assert_same(other, batch)
        assert made.plan.state() == expected[-1].plan.state, "this process's plan has got there, too"


def test_errors_of_workers_surface_in_their_place(config: Config) -> None:
    expected = list(loader(config).steps(4))
    victim = _image_of(loader(config), expected[2].plan.packs[1])
    made = loader(change(config, {"data.workers": 2}), decode=Stumbling(victim, "fail"))
    seen = []
    with pytest.raises(ZeroDivisionError, match="planted"):
        for step in made.steps(4):
            seen.append(step.plan.number)
    assert seen == [number for number in range(3) if number < _first_use(made, expected, victim)]


def test_a_worker_that_dies_is_named_with_what_it_was_at(config: Config) -> None:
    expected = list(loader(config).steps(4))
    victim = _image_of(loader(config), expected[2].plan.packs[1])
    made = loader(change(config, {"data.workers": 2}), decode=Stumbling(victim, "die"))
    step = _first_use(made, expected, victim) + 1
    message = rf"data: worker [01] \(process \d+\) died \(signal 9\) at work on pack \d of step {step} \(\d samples: "
    with pytest.raises(TransientFailure, match=message + r".*/000.*; files: .*-000000\.tar") as caught:
        list(made.steps(4))
    assert "data.workers" in str(caught.value)


def test_a_worker_that_is_late_is_named(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    expected = list(loader(config).steps(1))
    victim = _image_of(loader(config), expected[0].plan.packs[0])
    slow = change(config, {"data.workers": 1, "data.worker_timeout": 1.0})
    (step,) = loader(slow, decode=Stumbling(victim, "sleep")).steps(1)
    for batch, other in zip(expected[0].batches, step.batches, strict=True):
        assert_same(other, batch)
    assert re.search(
        r"data: worker 0 \(process \d+\) has been at work for 1 s or more on pack 0 of step 1", caplog.text
    )


def test_a_shard_that_changes_ends_a_run_with_workers_with_the_same_message(config: Config, own: Path) -> None:
    made = loader(change(only(config, own, "draw"), {"data.workers": 1}))
    shard = own / "scenes-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"scenes-000000\.tar: .* bytes at offset .* start again"):
        list(made.steps(4))


def test_steps_with_workers_may_be_left_early_and_taken_up(config: Config) -> None:
    """The plan stands where training does, whatever was prepared beyond it."""
    expected = list(loader(config).steps(4))
    made = loader(change(config, {"data.workers": 1}))
    steps = made.steps(100)
    assert next(steps).plan.number == 0 and next(steps).plan.number == 1
    steps.close()  # type: ignore[attr-defined]
    assert made.plan.state() == expected[1].plan.state
    assert [step.plan for step in made.steps(2)] == [step.plan for step in expected[2:]]


def test_the_bound_of_memory_counts_every_step_that_may_be_held(
    config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in training, `prefetch` waiting, and with a thread the one it is at."""
    made = loader(change(config, {"data.prefetch": 3, "data.workers": 0}))
    monkeypatch.setattr(Filler, "most_bytes", 2**30)
    for workers, steps in ((0, 5), (2, 4)):
        made.config = change(made.config, {"data.workers": workers})
        caplog.clear()
        with caplog.at_level("INFO"):
            made.steps(1)
        assert f"3 steps ahead, at most {config.train.packs_per_step * steps:.2f} GiB of images" in caplog.text


def _image_of(made: Loader, pack: PackPlan) -> bytes:
    """The bytes of the first image that a pack encodes."""
    laid_out = made.plan.lay_out(pack)
    image = vae_images(laid_out)[0]
    key = laid_out.samples[image.sample].key
    item = made.plan.document(key).items[image.slot]
    assert isinstance(item, ImageItem)
    return made.plan.sources[key.source].index.read(item.member)


def _first_use(made: Loader, steps: list[Step], blob: bytes) -> int:
    """The first step that shows an image with these bytes."""
    for step in steps:
        for pack in map(made.plan.lay_out, step.plan.packs):
            shown = [(pack.samples[n].key, image.slot) for n, image in vit_images(pack)]
            shown += [(pack.samples[image.sample].key, image.slot) for image in vae_images(pack)]
            for key, slot in shown:
                item = made.plan.document(key).items[slot]
                assert isinstance(item, ImageItem)
                if made.plan.sources[key.source].index.read(item.member) == blob:
                    return step.plan.number
    raise AssertionError("not used at all")
