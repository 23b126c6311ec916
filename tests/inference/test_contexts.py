"""The three contexts of guidance as data, and the masks that follow from them, against a plain definition."""

import numpy as np
import pytest
from megabagel_kernels.attention.mask import check, dense_mask

from megabagel.inference.contexts import (
    Branches,
    ImageContent,
    OpLog,
    TextContent,
    add_image,
    add_system,
    add_text,
    add_thought,
)
from megabagel.inference.placement import share_of
from megabagel.inference.segments import Layout, Segment, mask_codes, segment
from megabagel.sequence.sample import LATENT, VIT

SYSTEM, FIRST, SECOND, THOUGHT = (TextContent((1, *range(10, 10 + n), 2)) for n in (5, 1, 2, 3))
LATENTS, PATCHES = ImageContent(LATENT, 2, 3, None), ImageContent(VIT, 1, 2, None)


def contents(log: OpLog, context: tuple[int, ...]) -> list[object]:
    return [log.ops[number].content for number in context]


def built(*events: str) -> tuple[OpLog, Branches]:
    log, found = OpLog(), Branches()
    for event in events:
        if event == "image":
            found = add_image(log, found, LATENTS, PATCHES)
        elif event == "system":
            found = add_system(log, found, SYSTEM)
        elif event.startswith("thought"):
            found = add_thought(log, found, THOUGHT, image_free=event.endswith("both"))
        else:
            found = add_text(log, found, FIRST if event == "first" else SECOND)
    return log, found


IMAGE = [LATENTS, PATCHES]


@pytest.mark.parametrize(
    ("events", "main", "text_free", "image_free"),
    [
        ("first", [FIRST], [], [FIRST]),
        ("system first", [SYSTEM, FIRST], [SYSTEM], [SYSTEM, FIRST]),
        ("image first", [*IMAGE, FIRST], IMAGE, [FIRST]),
        ("first image", [FIRST, *IMAGE], [FIRST, *IMAGE], [FIRST]),
        ("image image first", [*IMAGE, *IMAGE, FIRST], [*IMAGE, *IMAGE], [FIRST]),
        ("first image second", [FIRST, *IMAGE, SECOND], [FIRST, *IMAGE], [FIRST, SECOND]),
        ("system first thought", [SYSTEM, FIRST, THOUGHT], [SYSTEM], [SYSTEM, FIRST]),
        (
            "system image first thought-both",
            [SYSTEM, *IMAGE, FIRST, THOUGHT],
            [SYSTEM, *IMAGE],
            [SYSTEM, FIRST, THOUGHT],
        ),
    ],
)
def test_which_op_each_branch_sees(events: str, main: list, text_free: list, image_free: list) -> None:
    log, found = built(*events.split())
    assert contents(log, found.main) == main
    assert contents(log, found.text_free) == text_free
    assert contents(log, found.image_free) == image_free


def test_equal_beginnings_are_one_op() -> None:
    log, found = built("system", "first")
    assert found.main == found.image_free == (0, 1), "text-to-image: no third branch"
    assert len(log.ops) == 2


def test_rotary_ids_of_a_branch_have_no_gap_where_images_were() -> None:
    log, found = built("first", "image", "second")
    assert log.position(found.main) == 3 + 1 + 1 + 4
    assert log.position(found.text_free) == 3 + 1 + 1
    assert log.position(found.image_free) == 3 + 4
    assert log.tokens(found.main) == 3 + 8 + 4 + 4


def visible(segments: list[Segment]) -> set[tuple[int, int]]:
    """(query, cache row) pairs by the mask integers; queries are numbered through all segments."""
    keys, codes = mask_codes(segments)
    check(codes)
    return {(int(q), int(keys[k])) for q, k in np.argwhere(dense_mask(codes))}


def by_definition(segments: list[Segment]) -> set[tuple[int, int]]:
    pairs, query = set(), 0
    for part in segments:
        for place in range(len(part.slots)):
            own = part.slots[: place + 1] if part.causal else part.slots
            pairs |= {(query, int(row)) for row in [*part.past, *own]}
            query += 1
    return pairs


def test_branches_of_a_picture_see_their_contexts_and_themselves() -> None:
    """The text-free context is a beginning of the main one, the image-free one lies elsewhere, one is empty."""
    rng = np.random.default_rng(0)
    rows = rng.permutation(90).astype(np.int64)
    main, free, slots = rows[:20], rows[30:37], rows[40:72].reshape(4, 8)
    pasts = [main, main[:12], free, rows[:0]]
    query = ImageContent(LATENT, 2, 3, None)
    branches = [segment(query, past, own, 9, (3, 4)) for past, own in zip(pasts, slots, strict=True)]
    assert visible(branches) == by_definition(branches)
    keys, _ = mask_codes(branches)
    assert len(keys) == (20 + 8) + 8 + (7 + 8) + 8, "the text-free context costs no keys of its own"


def test_a_prefill_of_several_ops_is_the_mask_of_the_sequence() -> None:
    """Text, image, text of one context in one pass, and the same texts alone for the image-free branch."""
    rows = np.arange(100, dtype=np.int64)
    text, image, more = FIRST, PATCHES, SECOND
    a = segment(text, rows[:0], rows[:3], 0, (3, 4))
    b = segment(image, rows[:3], rows[3:7], 3, (3, 4))
    c = segment(more, rows[:7], rows[7:11], 4, (3, 4))
    d = segment(more, rows[:3], rows[50:54], 3, (3, 4))
    assert visible([a, b, c, d]) == by_definition([a, b, c, d])


def test_an_image_has_one_rotary_id_and_understood_ends() -> None:
    part = segment(LATENTS, np.zeros(0, np.int64), np.arange(8), 5, (3, 4))
    assert part.position.tolist() == [5] * 8
    assert part.kind.tolist() == [0, *[LATENT] * 6, 0] and part.ids.tolist() == [3, *[0] * 6, 4]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_of_context_parallel_ranks_are_equal_and_hold_every_token_once(size: int) -> None:
    layout = Layout((segment(LATENTS, np.zeros(0, np.int64), np.arange(8), 0, (3, 4)),))
    for generation, count in ((False, 2), (True, 6)):
        shares = [share_of(layout.kind, generation, rank, size) for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        tokens = np.concatenate(shares)
        assert sorted(tokens[tokens >= 0].tolist()) == sorted(np.flatnonzero((layout.kind == LATENT) == generation))
        assert (tokens >= 0).sum() == count
