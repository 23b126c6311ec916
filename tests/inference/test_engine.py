"""The engine on a small model with random weights: equal bits in any company, rows that come back, clear refusals."""

from typing import Any

import numpy as np
import pytest

from megabagel.config.schema import Config, ModelConfig, ParallelConfig, VitConfig
from tests.support.rank_pool import RankPool

MODEL = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    ffn=48,
    vocab=300,
    vit=VitConfig(layers=1, hidden=32, heads=2, ffn=48, grid=8),
    latent_grid=8,
)
SPECIAL = (256, 257, 258, 259)
TEXTS = ((5, 6, 7), (8, 9), (20, 21, 22, 23))


def engine(cache_tokens: int = 2048, most_waiting: int = 256) -> Any:
    """On one device, every weight keyed by its name; the released start of zeros would hide the sampler."""
    import torch

    from megabagel.inference.build import build_runner
    from megabagel.inference.engine import Engine
    from megabagel.inference.programs import Special
    from megabagel.model.noise import normal
    from megabagel.parallel.attention import HOST
    from megabagel.runtime import cpu_backend
    from megabagel.sequence.keys import seed64

    cpu_backend.install()

    def fill(stage: torch.nn.Module) -> None:
        for name, parameter in stage.named_parameters():
            parameter.data.copy_(normal(seed64(0, name), *parameter.shape) * 0.3 + ("norm" in name))

    config = Config(model=MODEL, parallel=ParallelConfig(sp=False))
    return Engine(build_runner(config, None, HOST, fill, cache_tokens), Special(*SPECIAL), most_waiting=most_waiting)


def image(number: int) -> Any:
    """Clean latents and patches of an image of 2 x 3 latent tokens."""
    from megabagel.inference.contexts import ImageContent
    from megabagel.model.noise import normal
    from megabagel.sequence.sample import LATENT, VIT

    return (
        ImageContent(LATENT, 2, 3, normal(number, 6, MODEL.latent_dim)),
        ImageContent(VIT, 2, 2, normal(number + 1, 4, 588)),
    )


def drawing(engine: Any, seed: int, items: list[Any], points: int = 5, need: int = 300) -> Any:
    from megabagel.inference import requests
    from megabagel.inference.presets import PRESETS, adjusted
    from megabagel.inference.programs import official_noise

    preset = PRESETS["edit"]
    session = engine.session()
    requests.show(session, items)
    noise = official_noise(seed, 12, MODEL.latent_dim)
    return engine.submit(
        requests.draw(session, (3, 4), [noise], adjusted(preset.draw, points=points), preset), session, need
    )


def answering(engine: Any, items: list[Any], **options: Any) -> Any:
    from megabagel.inference import requests
    from megabagel.inference.decoding import TextSettings

    session = engine.session()
    requests.show(session, items)
    return engine.submit(requests.answer(session, TextSettings(**{"max_new_tokens": 9, **options})), session, 200)


KINDS = {
    "t2i": lambda e: drawing(e, 0, [TEXTS[0]]),
    "edit": lambda e: drawing(e, 1, [image(3), TEXTS[1]]),
    "two images": lambda e: drawing(e, 2, [image(5), image(7), TEXTS[2]], points=7),
    "answer": lambda e: answering(e, [image(3), TEXTS[0]]),
    "sampled": lambda e: answering(e, [TEXTS[2]], temperature=0.8, top_p=0.9, seed=4),
    "text": lambda e: answering(e, [TEXTS[1]], max_new_tokens=20),
}


def value(request: Any) -> Any:
    assert request.done.error is None, request.done.error
    result = request.done.result
    return result if isinstance(result, tuple) else result.tokens[0].numpy()


def until_idle(engine: Any) -> None:
    while not engine.idle:
        engine.step()


def companies() -> dict[str, list[Any]]:
    """Every kind of request alone, with all the others, and with others that are cancelled on the way."""
    found: dict[str, list[Any]] = {}
    one = engine()
    for name, make in KINDS.items():
        request = make(one)
        until_idle(one)
        found[name] = [value(request)]
    every = engine()
    requests = {name: make(every) for name, make in KINDS.items()}
    extra = [drawing(every, 9, [TEXTS[0]], points=30), answering(every, [TEXTS[0]], max_new_tokens=50)]
    for _ in range(3):
        every.step()
    for request in extra:
        every.cancel(request)
        assert request.done.error == "cancelled"
    until_idle(every)
    for name, request in requests.items():
        found[name].append(value(request))
    tight = engine()
    tight.most_tokens = 40
    requests = {name: make(tight) for name, make in reversed(KINDS.items())}
    until_idle(tight)
    for name, request in requests.items():
        found[name].append(value(request))
    assert one.cache.free_pages == every.cache.free_pages == tight.cache.free_pages == one.cache.pages
    assert every.passes < tight.passes
    return found


def test_results_have_the_same_bits_in_any_company(ranks: RankPool) -> None:
    (found,) = ranks.run(1, companies)
    for name, (alone, mixed, tight) in found.items():
        assert np.array_equal(alone, mixed) and np.array_equal(alone, tight), name
    pictures = [found[name][0] for name in ("t2i", "edit", "two images")]
    assert all(np.isfinite(x).all() and x.std() > 0.1 for x in pictures)
    assert not np.array_equal(pictures[0], pictures[1])
    assert len(set(map(tuple, (found[name][0] for name in ("answer", "sampled", "text"))))) == 3


def savings() -> dict[str, Any]:
    """A picture of a text with image guidance: its image-free branch is the main one, and is not computed twice."""
    from megabagel.inference.programs import Step

    one, found = engine(), {}
    drawing(one, 0, [TEXTS[0]])
    events = []
    rows = []
    run = one.runner.run
    one.runner.run = lambda parts: rows.append(sum(p.layout.tokens for p in parts)) or run(parts)
    while not one.idle:
        events += [event for _, event in one.step()]
    steps = [event for event in events if isinstance(event, Step)]
    found["rows"], found["steps"] = rows, len(steps)
    found["same"] = all(np.array_equal(s.branches[0]["main"], s.branches[0]["image_free"]) for s in steps)
    found["differs"] = not np.array_equal(steps[0].branches[0]["main"], steps[0].branches[0]["text_free"])
    return found


def test_a_branch_that_equals_another_is_not_computed(ranks: RankPool) -> None:
    (found,) = ranks.run(1, savings)
    assert found == {"rows": [5, *[2 * 14] * 4], "steps": 4, "same": True, "differs": True}


def refusals() -> dict[str, str]:
    from megabagel.errors import UserError

    small, found = engine(cache_tokens=256, most_waiting=2), {}
    with pytest.raises(UserError) as caught:
        drawing(small, 0, [TEXTS[0]], need=257)
    found["too large"] = str(caught.value)
    first, second = drawing(small, 0, [TEXTS[0]], need=250), drawing(small, 0, [TEXTS[0]], need=250)
    small.step()
    found["waits"] = str(first.parts is not None and second.parts is None)
    answering(small, [TEXTS[0]])
    with pytest.raises(UserError) as caught:
        answering(small, [TEXTS[0]])
    found["queue"] = str(caught.value)
    until_idle(small)
    found["equal"] = str(np.array_equal(value(first), value(second)))
    found["free"] = str(small.cache.free_pages == small.cache.pages)
    return found


def test_what_cannot_fit_is_refused_and_what_can_waits(ranks: RankPool) -> None:
    (found,) = ranks.run(1, refusals)
    assert found["too large"].startswith("the request needs 257 tokens of KV cache, the cache has 256: shorten")
    assert found["queue"] == "2 requests wait already, the limit is 2: try later"
    assert found["waits"] == found["equal"] == found["free"] == "True"


def untouched() -> bool:
    """Drawing writes into scratch rows only; the context's rows keep their bits, so a second picture is the same."""
    from megabagel.inference import requests
    from megabagel.inference.presets import PRESETS, adjusted
    from megabagel.inference.programs import official_noise

    one, preset = engine(), PRESETS["edit"]
    session = one.session()
    requests.show(session, [image(3), TEXTS[1]])
    settings, noise = adjusted(preset.draw, points=4), official_noise(0, 12, MODEL.latent_dim)
    found = []
    for _ in range(2):
        program = requests.draw(session, (3, 4), [noise], settings, preset)
        found.append(one.run(program, session, 200, ends_session=False).tokens[0])
        rows = session.log.rows(session.branches.main)
        found.append(one.cache.keys[1][rows].clone())
    session.close()
    return bool(np.array_equal(found[0], found[2]) and np.array_equal(found[1], found[3]))


def test_drawing_leaves_the_context_as_it_was(ranks: RankPool) -> None:
    assert ranks.run(1, untouched) == [True]
