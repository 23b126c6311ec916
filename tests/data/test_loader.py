"""From planned packs to words, patches and pixels, checked against a plain reading of the files."""

import io
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megabagel.config.schema import Config
from megabagel.data.decode import Request
from megabagel.data.decode.host import HostEngine
from megabagel.data.documents import ImageItem, Member, TextItem
from megabagel.data.load.collate import Filled
from megabagel.data.load.loader import Loader
from megabagel.data.plan.global_plan import GlobalPlan
from megabagel.data.plan.planned_sample import PackPlan
from megabagel.data.tokenize.token_ids import Writer
from megabagel.data.tokenize.tokenizer import TextTokenizer, load_tokenizer
from megabagel.errors import UserError
from megabagel.sequence.batch import BatchBuilder, PackedBatch
from megabagel.sequence.images import vae_images, vae_shares, vit_images, vit_shares
from megabagel.sequence.items import Clip, Latent, Text, Vit
from megabagel.sequence.keys import SampleKey
from megabagel.sequence.pack import Pack
from megabagel.sequence.rank_rows import RankPlace
from megabagel.sequence.sample import LATENT, TEXT, VIT, SamplePlan
from tests.support.batches import batch_builder, patches_of, token_ids
from tests.support.config_tree import change
from tests.support.small_run import small_config, sources_of

BOS, EOS, SOI, EOI = range(4)
"""Ids of the special tokens in the data set's tokenizer."""
PATCHES, LATENTS = -1, -2
CHANGED = "changed since it was indexed (`megabagel data index --check` finds such shards and indexes them again)"


@pytest.fixture(scope="module")
def config(shapes: Path) -> Config:
    return small_config(shapes)


@pytest.fixture(scope="module")
def tokenizer(config: Config) -> TextTokenizer:
    return load_tokenizer(config.data.tokenizer)


def loader(config: Config, batches: BatchBuilder | None = None, dp: tuple[int, int] = (0, 1), **options: Any) -> Loader:
    tokenizer, batches = load_tokenizer(config.data.tokenizer), batches or batch_builder(config)
    options = {"decode": HostEngine()} | options
    return Loader(GlobalPlan(sources_of(config), config), tokenizer, config=config, batches=batches, dp=dp, **options)


def filled(config: Config, steps: int = 4) -> tuple[Loader, list[PackedBatch]]:
    """A loader and the batches of its first steps."""
    made = loader(config)
    return made, [batch for step in made.steps(steps) for batch in step.batches]


def captions(made: Loader, sample: SamplePlan) -> dict[int, str]:
    """Texts of a sample by slot."""
    index = made.plan.sources[sample.key.source].index
    items = index.documents[sample.key.sample].items
    return {slot: index.text(item) for slot, item in enumerate(items) if isinstance(item, TextItem)}


def written(made: Loader, sample: SamplePlan, tokenizer: TextTokenizer) -> list[int]:
    """A sample as it should read: word ids, and marks for image tokens."""
    tokens = []
    for item in sample.items:
        if isinstance(item, Text):
            tokens += [BOS, *tokenizer.encode(captions(made, sample)[item.slot]), EOS]
        for image in item.frames if isinstance(item, Clip) else [item]:
            if not isinstance(image, Text):
                mark = PATCHES if isinstance(image, Vit) else LATENTS
                tokens += [SOI, *[mark] * (image.rows * image.cols), EOI]
    return tokens


def read(batch: PackedBatch) -> np.ndarray:
    """A pack as the model will read it: word ids on TEXT tokens, marks on the others."""
    tokens = np.select([batch.pack.kind_S == VIT, batch.pack.kind_S == LATENT], [PATCHES, LATENTS])
    tokens[batch.pack.kind_S == TEXT] = token_ids(batch)
    return tokens


def test_words_stand_where_they_belong(config: Config, tokenizer: TextTokenizer) -> None:
    made, batches = filled(config)
    sources = set()
    for batch in batches:
        expected = [token for sample in batch.pack.samples for token in written(made, sample, tokenizer)]
        assert read(batch).tolist() == expected
        sources |= {sample.key.source for sample in batch.pack.samples}
    assert sources == set(made.plan.sources)


def test_labels_spell_the_captions(config: Config, tokenizer: TextTokenizer) -> None:
    """The next word of every row with cross-entropy: the text's ids and eos; nothing else bears this loss."""
    made, batches = filled(config)
    learned = 0
    for batch in batches:
        labels = read(batch)[np.flatnonzero(batch.pack.ce_S) + 1].tolist()
        for sample in batch.pack.samples:
            for item in sample.items:
                if isinstance(item, Text) and item.loss:
                    mine, labels = labels[: item.length + 1], labels[item.length + 1 :]
                    assert tokenizer.decode(mine) == captions(made, sample)[item.slot] and mine[-1] == EOS
                    learned += 1
        assert not labels
    assert learned > 10


def view(made: Loader, sample: SamplePlan, slot: int, height: int, width: int) -> np.ndarray:
    """[height, width, 3] in [-1, 1] of an image, read without the program's decoder."""
    index = made.plan.sources[sample.key.source].index
    item = index.documents[sample.key.sample].items[slot]
    assert isinstance(item, ImageItem)
    image = Image.open(io.BytesIO(index.read(item.member))).convert("RGB").resize((width, height), Image.BICUBIC)
    return (np.asarray(image, np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)


def test_patches_are_those_of_the_named_image(config: Config) -> None:
    made, batches = filled(change(config, {"data.drop_vit": 0.0}), steps=6)
    shapes = set()
    for batch in batches:
        seen = [(sample, item) for sample in batch.pack.samples for item in sample.items if isinstance(item, Vit)]
        for (sample, item), patches in zip(seen, patches_of(batch, (item for _, item in seen)), strict=True):
            pixels = view(made, sample, item.slot, 14 * item.rows, 14 * item.cols)
            cells = [(row, col) for row in range(item.rows) for col in range(item.cols)]
            for patch, (row, col) in zip(patches.numpy(), cells, strict=True):
                assert np.array_equal(patch, pixels[14 * row : 14 * row + 14, 14 * col : 14 * col + 14].ravel())
            shapes.add((item.rows, item.cols))
    assert shapes == {(3, 3), (3, 4)}  # 48 x 36 and 48 x 48, 48 x 60


def test_pixels_are_those_of_the_named_image(config: Config) -> None:
    """Every image is encoded once, in order of first use, also where its latents appear twice."""
    made, batches = filled(config)
    shapes, repeated = set(), 0
    for batch in batches:
        used: dict[tuple[int, int], Latent] = {}
        for number, sample in enumerate(batch.pack.samples):
            for item in sample.items:
                for image in item.frames if isinstance(item, Clip) else [item]:
                    if isinstance(image, Latent):
                        repeated += (number, image.slot) in used
                        used.setdefault((number, image.slot), image)
        for ((number, slot), image), pixels in zip(used.items(), batch.pixels, strict=True):
            expected = view(made, batch.pack.samples[number], slot, 16 * image.rows, 16 * image.cols)
            assert pixels.dtype == torch.float32
            assert np.array_equal(pixels.numpy(), expected.transpose(2, 0, 1))
            shapes.add((image.rows, image.cols))
    assert shapes == {(3, 3), (2, 3), (3, 4)} and repeated > 2


def test_batches_are_those_of_the_plan(config: Config) -> None:
    plan = GlobalPlan(sources_of(config), config)
    for number, step in enumerate(loader(config).steps(3)):
        expected = plan.next_step()
        assert step.plan.number == number
        assert [_keys(batch.pack) for batch in step.batches] == [_planned(pack) for pack in expected.packs]
        assert step.plan.state == expected.state and not step.lost


def test_data_parallel_ranks_take_their_share(config: Config) -> None:
    steps = [list(loader(config, dp=(rank, 2)).steps(3)) for rank in range(2)]
    for one, two in zip(*steps, strict=True):
        assert one.plan.packs == two.plan.packs
        for rank, step in enumerate((one, two)):
            share = step.plan.share(rank, 2)
            assert [_keys(batch.pack) for batch in step.batches] == [_planned(step.plan.packs[n]) for n in share]
        assert {*one.plan.share(0, 2), *two.plan.share(1, 2)} == {0, 1, 2, 3}


def _keys(pack: Pack) -> list[Any]:
    return [sample.key for sample in pack.samples]


def _planned(pack: PackPlan) -> list[Any]:
    return [visit.key for visit in pack.visits]


def test_ranks_of_a_stage_share_the_images(config: Config) -> None:
    """tp = cp = 2: ViT images are dealt over cp, images to encode over all four ranks; later stages get none."""
    grid = change(config, {"parallel.tp": 2, "parallel.cp": 2, "parallel.pp": 2})
    whole = loader(config)
    places = [(tp, cp) for tp in range(2) for cp in range(2)]
    ranks = {(tp, cp): loader(grid, batch_builder(grid, RankPlace(tp, cp, last=False))) for tp, cp in places}
    later = loader(grid, batch_builder(grid, RankPlace(first=False)))
    step = whole.plan.next_step()
    for number in range(len(step.packs)):
        task = whole.plan.task(step, number)
        everything = whole.filler(task).batch
        pack = everything.pack
        batches = {place: rank.filler(task).batch for place, rank in ranks.items()}
        idle = later.filler(task).batch
        assert idle.patches is None and idle.pixels == []
        for batch in (*batches.values(), idle):
            assert batch.layout.cp == 2 and np.array_equal(batch.layout.token_K, idle.layout.token_K)
        for tp in range(2):
            assert token_ids(*(batches[tp, cp] for cp in range(2))) == token_ids(everything)
            dealt = vit_shares(pack, 2).dealt
            assert sorted(dealt[0] + dealt[1]) == list(range(len(vit_images(pack))))
            images = [image for _, image in vit_images(pack)]
            shared = [patches_of(batches[tp, cp], (images[i] for i in dealt[cp])) for cp in range(2)]
            _assert_dealt(patches_of(everything, images), dealt, shared)
        order = [(tp, cp) for cp in range(2) for tp in range(2)]
        dealt = vae_shares(pack, 4).dealt
        assert sorted(number for part in dealt for number in part) == list(range(len(vae_images(pack))))
        _assert_dealt(everything.pixels, dealt, [batches[place].pixels for place in order])


def _assert_dealt(images: list[torch.Tensor], dealt: Sequence[Sequence[int]], found: list[list[torch.Tensor]]) -> None:
    for numbers, mine in zip(dealt, found, strict=True):
        assert all(torch.equal(images[number], image) for number, image in zip(numbers, mine, strict=True))


@pytest.fixture
def own(shapes: Path, tmp_path: Path) -> Path:
    """A copy of the data set that a test may harm."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def only(config: Config, root: Path, source: str) -> Config:
    """The run on one source of another folder."""
    sources = tuple(entry for entry in config.data.sources if entry.name == source)
    return change(config, {"data.root": str(root), "data.sources": sources, "data.drop_vit": 0.0})


def damage(made: Loader, key: SampleKey, slot: int) -> None:
    """Overwrite the bytes of an image where they lie."""
    index = made.plan.sources[key.source].index
    item = index.documents[key.sample].items[slot]
    assert isinstance(item, ImageItem) and isinstance(item.member, Member)
    with index.reader.shards[item.member.shard].open("r+b") as file:
        file.seek(item.member.offset)
        file.write(bytes(item.member.size))


def lost(made: Loader, slot: int) -> tuple[PackedBatch, Filled]:
    """The batch of the first pack before and after the second sample's image was damaged."""
    task = made.plan.task(made.plan.next_step(), 0)
    before = made.filler(task)
    assert before.lost == ()
    damage(made, task.plan.visits[1].key, slot)
    return before.batch, made.filler(task)


def _differing(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[int]:
    return [number for number, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)]


def test_a_damaged_target_becomes_nan(config: Config, own: Path) -> None:
    made = loader(only(config, own, "draw"))
    before, filled = lost(made, slot=1)
    after, (image,) = filled.batch, filled.lost
    assert _differing(before.pixels, after.pixels) == [1]
    assert after.pixels[1].shape == before.pixels[1].shape and after.pixels[1].isnan().all()
    assert token_ids(before) == token_ids(after)
    key = after.pack.samples[1].key
    assert (image.key, image.slot) == (key, 1)
    assert image.message == f"source draw, sample {made.plan.document(key).key}: image lost: {CHANGED}"


def test_a_damaged_image_to_look_at_becomes_grey(config: Config, own: Path) -> None:
    before, filled = lost(loader(only(config, own, "caption")), slot=0)
    after = filled.batch
    images = [image for _, image in vit_images(before.pack)]
    intact, grey = patches_of(before, images), patches_of(after, images)
    assert _differing(intact, grey) == [1]
    assert grey[1].shape == intact[1].shape and (grey[1] == 0).all()
    assert len(filled.lost) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_goes_on_past_damaged_images(
    config: Config, own: Path, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    made = loader(change(only(config, own, "draw"), {"data.workers": workers}))
    plan = GlobalPlan(list(made.plan.sources.values()), made.config)
    packs = [pack for _ in range(3) for pack in plan.next_step().packs]
    for visit in (packs[0].visits[0], packs[9].visits[1]):
        damage(made, visit.key, slot=1)
    steps = list(made.steps(3))
    assert [len(step.lost) for step in steps] == [1, 0, 1]
    assert caplog.text.count("image lost: changed since it was indexed") == 2
    batches = [batch for step in steps for batch in step.batches]
    broken = [
        (number, place)
        for number, batch in enumerate(batches)
        for place, pixels in enumerate(batch.pixels)
        if not pixels.isfinite().all()
    ]
    assert broken == [(0, 0), (9, 1)]


def test_errors_of_the_background_thread_surface(config: Config) -> None:
    calls = 0

    def failing(requests: Sequence[Request]) -> Any:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise ZeroDivisionError("planted")
        return HostEngine()(requests)

    seen = []
    with pytest.raises(ZeroDivisionError, match="planted"):
        for step in loader(config, decode=failing).steps(50):
            seen.append(step.plan.number)
    assert seen and seen == list(range(len(seen))), "steps before the error are delivered"
    _assert_no_thread()


def test_a_shard_that_changes_ends_the_run_with_a_message(config: Config, own: Path) -> None:
    made = loader(only(config, own, "draw"))
    shard = own / "scenes-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"scenes-000000\.tar: .* bytes at offset .* start again"):
        list(made.steps(4))
    _assert_no_thread()


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "loader"]


def _assert_no_thread(patience: float = 5.0) -> None:
    end = time.monotonic() + patience
    while _threads() and time.monotonic() < end:
        time.sleep(0.02)
    assert not _threads()


def test_closing_early_ends_the_thread(config: Config) -> None:
    made = loader(config)
    steps = made.steps(1000)
    assert isinstance(steps, Iterator)
    next(steps)
    assert len(_threads()) == 1
    steps.close()  # type: ignore[attr-defined]
    _assert_no_thread()
    reached = made.plan.step
    assert reached <= 1 + config.data.prefetch + 1  # taken, ready, in the making


def test_the_last_step_ends_the_thread(config: Config) -> None:
    made = loader(config)
    assert len(list(made.steps(2))) == 2
    _assert_no_thread()
    assert made.plan.step == 2
    assert list(made.steps(0)) == []


@pytest.mark.parametrize("prefetch", [1, 3])
def test_no_more_steps_are_prepared_than_asked_for(config: Config, prefetch: int) -> None:
    made = loader(change(config, {"data.prefetch": prefetch}))
    steps = made.steps(1000)
    for taken in (1, 2):
        next(steps)
        end = time.monotonic() + 5
        while made.plan.step < taken + prefetch and time.monotonic() < end:
            time.sleep(0.02)
        time.sleep(0.1)
        assert taken + prefetch <= made.plan.step <= taken + prefetch + 1
    steps.close()  # type: ignore[attr-defined]
    _assert_no_thread()


def test_long_captions_are_read_from_their_shard(config: Config, tokenizer: TextTokenizer) -> None:
    """Texts that the index does not hold are found by their place."""
    made = loader(only(config, Path(config.data.root), "notes"))
    (source,) = made.plan.sources.values()
    shard = source.index.reader.shards[0].read_bytes()
    documents = []
    for document in source.index.documents:
        (item,) = document.items
        assert isinstance(item, TextItem) and isinstance(item.source, str)
        member = Member(0, shard.index(item.source.encode()), len(item.source.encode()))
        documents.append(replace(document, items=(replace(item, source=member),)))
    inside = [token_ids(batch) for step in made.steps(2) for batch in step.batches]
    outside = loader(made.config)
    outside.plan.sources["notes"] = replace(source, index=replace(source.index, documents=tuple(documents)))
    assert inside == [token_ids(batch) for step in outside.steps(2) for batch in step.batches]


@pytest.mark.parametrize("task", ["notes", "draw"])
def test_a_text_that_changed_silences_its_sample(
    config: Config, own: Path, tokenizer: TextTokenizer, task: str
) -> None:
    """Its words become eos, its rows lose their losses, its image is lost; the other samples stay as they were."""
    made = loader(only(config, own, task))
    (source,) = made.plan.sources.values()
    planned = made.plan.task(made.plan.next_step(), 0)
    before = made.filler(planned).batch
    key = planned.plan.visits[1].key
    document = source.index.documents[key.sample]
    slot = next(slot for slot, item in enumerate(document.items) if isinstance(item, TextItem))
    item = document.items[slot]
    assert isinstance(item, TextItem) and isinstance(item.source, str) and item.crc is not None
    shard = source.index.reader.shards[0].read_bytes()
    member = Member(0, shard.index(item.source.encode()), len(item.source.encode()))
    other = replace(item, source=member, crc=item.crc ^ 1)
    documents = list(planned.documents)
    documents[1] = replace(document, items=(*document.items[:slot], other, *document.items[slot + 1 :]))
    filled = made.filler(replace(planned, documents=tuple(documents)))
    mine_S = before.pack.sample_S == 1
    assert not filled.batch.pack.ce_S[mine_S].any()
    assert np.array_equal(filled.batch.pack.ce_S[~mine_S], before.pack.ce_S[~mine_S])
    words = read(filled.batch)
    assert np.array_equal(words[~mine_S], read(before)[~mine_S])
    assert (words[mine_S] == EOS).sum() >= item.n_ids
    assert _differing(before.pixels, filled.batch.pixels) == ([1] if task == "draw" else [])
    texts = [image for image in filled.lost if "text lost: changed since it was indexed" in image.message]
    assert [(image.key, image.slot) for image in texts] == [(key, slot)]


def test_writer_brackets_every_item(tokenizer: TextTokenizer) -> None:
    frame = Latent(2, 1, 2, noised=True)
    items = [Text(0, 2), Vit(1, 2, 2), Clip((frame, frame), (1, 1), chain=0), Text(5, 0, loss=True), frame]
    words = Writer(tokenizer).words(items, {0: [40, 41], 5: []}.__getitem__)
    assert words == [BOS, 40, 41, EOS, SOI, EOI, SOI, EOI, SOI, EOI, BOS, EOS, SOI, EOI]
