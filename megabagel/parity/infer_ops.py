"""The ops of a sub-case of an `infer_*` case, run one by one; pictures and texts follow when their contexts exist."""

from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megabagel.config.schema import (
    ResizeConfig,
)
from megabagel.errors import UserError
from megabagel.inference.contexts import ImageContent
from megabagel.inference.pictures import latent_tokens, patches_of, resized
from megabagel.inference.programs import (
    prefill,
)
from megabagel.parity.comparisons import Row, compare
from megabagel.parity.infer_format import grid_of, of_new_format
from megabagel.parity.infer_images import compare_image
from megabagel.parity.infer_state import SubCase
from megabagel.parity.infer_texts import compare_text
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.sample import LATENT, VIT


def replayed(sub: SubCase) -> list[Row]:
    """All comparisons."""
    sub.tensors, sub.found = sub.case.tensors(sub.tag), []
    sub.about = of_new_format(sub.about, sub.tensors, sub.case.about)
    count = max(len(op["kv_before"]) for op in sub.about["ops"])
    sub.sessions = [sub.engine.session() for _ in range(count)]
    sub.pictures = []
    sub.context_of = [{(): ()} for _ in range(count)]
    waiting = list(enumerate(sub.about["images"]))
    for number, op in enumerate(sub.about["ops"]):
        # A picture that a later op shows is made before that op.
        while waiting and _feeds_back(sub, number, op) and len(sub.pictures) <= _shown(sub, number):
            compare_image(sub, *waiting.pop(0))
        _op(sub, number, op)
    for number, image in waiting:
        compare_image(sub, number, image)
    for number, text in enumerate(sub.about["texts"]):
        compare_text(sub, number, text)
    for session in sub.sessions:
        session.close()
    return sub.found


def _feeds_back(sub: SubCase, number: int, op: dict[str, Any]) -> bool:
    return op["op"] == "vae" and f"op{number}.pixels_u8" in sub.tensors and number > 0


def _shown(sub: SubCase, number: int) -> int:
    """Pictures that were fed back up to an op."""
    return sum(_feeds_back(sub, n, op) for n, op in enumerate(sub.about["ops"][:number]))


def _op(sub: SubCase, number: int, op: dict[str, Any]) -> None:
    """Append an op to its context in every sequence of the batch."""
    keys = []
    for index, session in enumerate(sub.sessions):
        theirs = tuple(op["on"])
        on = sub.context_of[index][theirs]
        content = _content(sub, number, op, index)
        log = session.log
        sub.fact(f"op{number} position[{index}]", log.position(on), op["positions_per_sequence"][index])
        sub.fact(f"op{number} kv_before[{index}]", log.tokens(on), op["kv_before"][index])
        context = log.append(on, content)
        sub.context_of[index][(*theirs, number)] = context
        sub.fact(f"op{number} kv_after[{index}]", log.tokens(context), op["kv_after"][index])
        sub.engine.run(prefill(session, [context]), session, ends_session=False)
        slots = log.slots[context[-1]]
        assert slots is not None
        keys.append(slots)
    sub.compare_cache(f"op{number}.", np.concatenate(keys))


def _content(sub: SubCase, number: int, op: dict[str, Any], index: int) -> Any:
    model, tensors, name = sub.config.model, sub.tensors, f"op{number}"
    if op["op"] == "text":
        ids = op["ids_with_bos_eos"][index]
        return replace_ids(sub.sessions[index].special.text(ids[1:-1]), ids)
    if op["op"] == "vit":
        rows, cols, at = _vit_grid(sub, number, op, index)
        ids = tensors[f"{name}.vit_position_ids"]
        mine = grid_ids(rows, cols, model.vit.grid, model.interpolate_pos)
        sub.fact(f"{name}.vit_position_ids[{index}]", mine, ids[at : at + rows * cols])
        values = tensors.get(f"{name}.vit_tokens")
        if values is None:
            values = (tensors[f"{name}.vit_tokens_u8"].float() / 255 - 0.5) / 0.5
        values = values[at : at + rows * cols]
        _pixels(sub, number, op, values)
        return ImageContent(VIT, rows, cols, values)
    rows, cols = op["hw"][index]
    at = sum(r * c for r, c in op["hw"][:index])
    mine = grid_ids(rows, cols, model.latent_grid, model.interpolate_pos)
    sub.fact(f"{name}.latent_position_ids[{index}]", mine, tensors[f"{name}.latent_position_ids"][at:][: len(mine)])
    latent = tensors[f"{name}.latent"][index]
    if sub.codec is not None and f"{name}.pixels_u8" in tensors:
        latent = _encoded(sub, name)
    cells = latent[:, : rows * model.latent_patch, : cols * model.latent_patch]
    return ImageContent(LATENT, rows, cols, latent_tokens(cells, model.latent_patch))


def _vit_grid(sub: SubCase, number: int, op: dict[str, Any], index: int) -> tuple[int, int, int]:
    """(rows, columns, first patch) of a sequence's image, read off its grid ids."""
    sizes = op["vit_token_seqlens"]
    at, size = sum(sizes[:index]), sizes[index]
    ids = sub.tensors[f"op{number}.vit_position_ids"][at : at + size]
    rows, cols = grid_of(ids, sub.config.model.vit.grid, sub.config.model.interpolate_pos)
    return rows, cols, at


def _encoded(sub: SubCase, name: str) -> Tensor:
    """The codec's latent of an op's pixels with the case's posterior noise, compared with the case's."""
    assert sub.codec is not None
    levels = sub.tensors[f"{name}.pixels_u8"]
    pixels = (levels.float() / 255 - 0.5) / 0.5
    latent = sub.codec.sample(sub.codec.moments(pixels), sub.tensors[f"{name}.posterior_eps"])
    sub.check(f"{name}.latent", latent)
    if _feeds_back(sub, int(name.removeprefix("op")), {"op": "vae"}):
        fed = sub.tensors.get(f"out{_shown(sub, int(name.removeprefix('op')))}.uint8")
        if fed is not None:  # the case's own picture: ours may differ in levels at a border
            sub.check(f"{name}.pixels_u8", fed.permute(2, 0, 1)[None], exact=True)
    return latent[0]


def _pixels(sub: SubCase, number: int, op: dict[str, Any], patches: Tensor) -> None:
    """From the case's picture to patches by the resize rules, exact."""
    at = sum(o["op"] == "vit" for o in sub.about["ops"][:number])
    picture = sub.tensors.get(f"image{at}.uint8")
    if picture is None or "vit_transform" not in sub.about:
        return
    model = sub.config.model
    image = Image.fromarray(picture.numpy())
    for key, stride in (("vae_transform", None), ("vit_transform", None)):
        if key in sub.about:
            most, least, stride = sub.about[key]
            image = resized(image, ResizeConfig(most, least), stride)
    found = patches_of(image, model.vit.patch)
    sub.found.append(compare(f"{sub.tag}/op{number} patches of image{at}", found, patches, sub.gates.exact))


def replace_ids(content: Any, ids: list[int]) -> Any:
    """The text exactly as the case has it; raises UserError where its delimiters are not bos and eos."""
    if list(content.ids) != list(ids):
        raise UserError(f"a text op of the case is {list(ids)}, expected bos, ids, eos: {list(content.ids)}")
    return content
