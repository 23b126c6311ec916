"""From videos to sequences of frames with the change between them (BAGEL section 3.3.1).

Thresholds are ours where the paper gives none: it names the steps, about four frames a clip, and captions of at most 30
tokens. All measures come from the one scan of the step `shots`.
"""

import io
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megabagel.curation.draft import Draft, Item, Picture, Text
from megabagel.curation.measure import shots as measures
from megabagel.curation.measure.look import look, shrunk
from megabagel.curation.measure.pictures import near_groups
from megabagel.curation.measure.texts import count_tokens, first_tokens
from megabagel.curation.models.seam import Models, Question
from megabagel.curation.read import decode_video
from megabagel.curation.repeats import Rows
from megabagel.curation.rewrite import chat_of
from megabagel.curation.steps import Context, by_document, step
from megabagel.data.documents import SampleError
from megabagel.sequence.keys import generator


@step
def shots(
    drafts: Iterable[Draft], context: Context, *, least: float = 15.0, ratio: float = 3.0, merge_bits: int = 6
) -> Iterator[Draft]:
    """Take videos apart at their cuts, merge neighbours that look alike, and measure every clip.

    Neighbours are merged whose middle frames' 64-bit hashes differ in at most `merge_bits`.
    """
    for draft in drafts:
        path = Path(draft.clips[0].path)
        try:
            found = measures.scan(decode_video.small_frames(path))
        except SampleError as error:
            context.drop(draft, error.reason)
            continue
        parts = _merged(found, measures.cuts(found.differences, least, ratio), merge_bits)
        context.added(documents=len(parts) - 1)
        for number, (first, last) in enumerate(parts):
            yield _part(draft, found, number, first, last, len(parts))


def _merged(found: measures.Scan, cuts: list[int], bits: int) -> list[tuple[int, int]]:
    edges = [0, *cuts, len(found.times)]
    parts = [(edges[0], edges[1])]
    for first, last in pairwise(edges[1:]):
        middle, before = (found.hashes[(a + b) // 2] for a, b in ((first, last), parts[-1]))
        if (middle ^ before).bit_count() <= bits:
            parts[-1] = parts[-1][0], last
        else:
            parts.append((first, last))
    return parts


def _part(draft: Draft, found: measures.Scan, number: int, first: int, last: int, parts: int) -> Draft:
    """A clip with its measures."""
    times = found.times[first:last]
    seconds = max(times[-1] - times[0], 1e-6)
    rate = (len(times) - 1) / seconds if len(times) > 1 else 1.0
    hashes = [found.hashes[place] for place in (first, (first + last) // 2, last - 1)]
    motion = found.differences[first + 1 : last]
    assert found.brightest is not None
    meta: dict[str, Any] = {
        "frames": [first, last],
        "seconds": round(seconds, 3) if len(times) > 1 else 0.0,
        "motion": round(float(np.mean(motion)), 3) if motion else 0.0,
        "clarity": round(float(np.median(found.clarities[first:last])), 1),
        "box": [round(edge, 4) for edge in measures.content_box(found.brightest)],
        "overlay": round(measures.overlay_share(found), 4),
        "hashes": [f"{value:016x}" for value in hashes],
    }
    clip = replace(draft.clips[0], first=first, last=last, fps=rate)
    made = replace(draft, key=f"{draft.key}-{number:03d}", items=(clip,))
    return made.noted(f"shots: clip {number + 1} of {parts}", **meta)


@by_document
def clip_length(draft: Draft, *, least: float = 1.0, most: float = 20.0) -> str | None:
    """Length in seconds."""
    if draft.meta["seconds"] < least:
        return "clip too short"
    return "clip too long" if draft.meta["seconds"] > most else None


@by_document
def clip_clarity(draft: Draft, *, least: float = 20.0) -> str | None:
    """Median over the frames of the Laplacian's variance at 160 pixels."""
    return "blurred clip" if draft.meta["clarity"] < least else None


@by_document
def clip_motion(draft: Draft, *, least: float = 0.5, most: float = 30.0) -> str | None:
    """Motion stability: mean |difference| of neighbouring frames in levels."""
    if draft.meta["motion"] < least:
        return "hardly any motion"
    return "too much motion" if draft.meta["motion"] > most else None


@by_document
def overlays(draft: Draft, *, most: float = 0.01) -> str | None:
    """Static logos and texts near the border: most share of pixels."""
    return "static overlay" if draft.meta["overlay"] > most else None


def _clip_hashes(draft: Draft, models: Models | None, *, bits: int) -> list[str]:
    return list(draft.meta["hashes"])


def _first_clips(rows: Rows, *, bits: int) -> dict[str, Any]:
    """By partition: keys of clips whose middle frame is near to that of a clip before them."""
    keys = [(partition, key, hashes[1]) for partition, documents in rows for key, hashes in documents]
    tables: dict[str, Any] = {partition: [] for partition, _, _ in keys}
    values = np.array([int(value, 16) for _, _, value in keys], dtype=np.uint64)
    for place, first in enumerate(near_groups(values, bits) if keys else ()):
        if first != place:
            tables[keys[place][0]].append(keys[place][1])
    return tables


@step(sketch=_clip_hashes, reduce=_first_clips)
def near_clips(drafts: Iterable[Draft], context: Context, *, bits: int = 6) -> Iterator[Draft]:
    """Keep the first of clips whose middle frames' hashes differ in at most `bits`, over all videos."""
    gone = set(context.table)
    for draft in drafts:
        if draft.key in gone:
            context.drop(draft, "near duplicate of a clip")
        else:
            yield draft


@step
def frames(
    drafts: Iterable[Draft],
    context: Context,
    *,
    least: int = 2,
    most: int = 8,
    mean: float = 4.0,
    side: int = 256,
    as_clip: bool = False,
) -> Iterator[Draft]:
    """Pick frames of a clip, about `mean`, without black borders; `as_clip` marks them as frames of one video.

    Their number is least plus a binomial draw, their times are spread evenly with a draw in each part; both are keyed
    by the clip. Frames with a side below `side` after cropping are no use.
    """
    for draft in drafts:
        clip = draft.clips[0]
        rng = generator(context.seed, "frames", draft.key)
        share = (mean - least) / (most - least) if most > least else 0.0
        count = min(least + int(rng.binomial(most - least, share)), clip.last - clip.first)
        places = (np.arange(count) + rng.random(count)) / max(1, count) * (clip.last - clip.first)
        numbers = sorted({clip.first + int(place) for place in places})
        images = [_cropped(image, draft.meta["box"]) for image in decode_video.full_frames(Path(clip.path), numbers)]
        if len(images) < 2:
            context.drop(draft, "fewer than two frames")
        elif min(length for image in images for length in image.size) < side:
            context.drop(draft, f"a side below {side}")
        else:
            pictures = [
                Picture(f"{draft.source}#{number}", _jpeg(image), frame=as_clip and place > 0)
                for place, (number, image) in enumerate(zip(numbers, images, strict=False))
            ]
            context.added(pictures=len(pictures))
            deltas = [round((b - a) / clip.fps, 3) for a, b in pairwise(numbers)]
            made = replace(draft, items=tuple(pictures))
            yield made.noted(f"frames: {len(pictures)}", picked=numbers, frame_delta=deltas)


def _cropped(image: Image.Image, box: list[float]) -> Image.Image:
    """The image without borders of at least 2 % of a side."""
    left, top, right, bottom = (edge if abs(edge - whole) >= 0.02 else whole for edge, whole in zip(box, (0, 0, 1, 1)))  # noqa: B905
    if right <= left or bottom <= top:
        return image
    width, height = image.size
    return image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95)
    return file.getvalue()


@step
def change_captions(
    drafts: Iterable[Draft], context: Context, *, by: str = "motion", most_tokens: int = 30
) -> Iterator[Draft]:
    """Put before every frame but the first a caption of the change since the one before, of at most 30 tokens.

    `by: model` asks for it, and a second time for an answer that is too long, which is then cut at a clause.
    `by: motion` words the shift of the view and the amount of change.
    """
    batch = list(drafts)
    models = chat_of(context, "change_captions", by, "motion")
    pairs = [pair for draft in batch for pair in pairwise(draft.pictures)]
    captions = _asked(models, pairs, most_tokens) if models else [motion_caption(*pair) for pair in pairs]
    left = iter(captions)
    for draft in batch:
        items: list[Item] = list(draft.pictures[:1])
        for picture in draft.pictures[1:]:
            items += [Text(next(left)), picture]
        yield replace(draft, items=tuple(items)).noted(f"change_captions: {len(draft.pictures) - 1} by {by}")


def _asked(models: Models, pairs: list[tuple[Picture, Picture]], most_tokens: int) -> list[str]:
    def ask(places: list[int], tokens: int) -> list[str]:
        return models.ask([Question("change", tuple(p.data or b"" for p in pairs[n]), tokens) for n in places])

    answers = [" ".join(answer.split()) for answer in ask(list(range(len(pairs))), 2 * most_tokens)]
    long = [number for number, answer in enumerate(answers) if count_tokens(answer) > most_tokens]
    for number, answer in zip(long, ask(long, most_tokens), strict=True):  # asked again, with less room
        answers[number] = " ".join(answer.split())
    return [first_tokens(answer, most_tokens) or "The scene changes." for answer in answers]


def motion_caption(first: Picture, second: Picture) -> str:
    """A sentence on how the view moves and how much changes between two frames."""
    one, other = (
        np.asarray(shrunk(Image.fromarray(look(picture.data or b"").grey), measures.WIDTH))
        for picture in (first, second)
    )
    amount = float(np.abs(one.astype(float) - other).mean())
    down, right = measures.shift(one, other)
    if amount < 2:
        return "Hardly anything changes."
    ways = [("up" if down > 0 else "down", abs(down)), ("left" if right > 0 else "right", abs(right))]
    # The content moves against the camera.
    seen = [way for way, pixels in ways if 4 <= pixels <= measures.WIDTH // 3]
    moved = f"The camera moves {' and '.join(seen)}" if seen else "The camera stays"
    size = "little changes" if amount < 8 else "things move" if amount < 25 else "much changes"
    return f"{moved}, and {size}."
