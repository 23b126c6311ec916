"""The format of `infer_*` cases: grids read off position ids, and the first case brought to the later format."""

from typing import Any

from torch import Tensor

from megabagel.errors import UserError
from megabagel.sequence.grid import grid_ids


def grid_of(ids: Tensor, side: int, stretched: bool) -> tuple[int, int]:
    """Rows and columns of an image from its grid ids on a table of `side` x `side`."""
    count = len(ids)
    for rows in range(1, count + 1):
        cols = count // rows
        fits = rows * cols == count and max(rows, cols) <= side
        if fits and grid_ids(rows, cols, side, stretched).tolist() == ids.tolist():
            return rows, cols
    raise UserError(f"position ids {ids.tolist()[:8]} ... are those of no image; copy the case again")


def of_new_format(about: dict[str, Any], tensors: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Any]:
    """The first case of all, in the format of the later ones."""
    if "clean_contexts" not in about:
        return {"images": [], "texts": [], **about}
    ops: list[dict[str, Any]] = []
    for op in about["ops"]:
        before = op["kv_before"][0]
        on = tuple(range(len(ops))) if before else ()
        ids = [op["ids_with_bos_eos"]] if "ids_with_bos_eos" in op else None
        sizes = [op["kv_after"] - before - 2]
        ops.append({**op, "on": on, "kv_after": [op["kv_after"]], "ids_with_bos_eos": ids, "vit_token_seqlens": sizes,
                    "positions_per_sequence": [op["pos_first"]]})  # fmt: skip
    new: dict[str, Any] = {"ops": ops, "images": [], "texts": [], "noise_seed": about.get("init_noise_seed")}
    if "image" in about:
        image, tokens = about["image"], len(tensors["init_noise"])
        facts = {key: [value] if key.endswith("position") else value for key, value in image.items()}
        new["images"] = [
            {**facts, "contexts": about["clean_contexts"], "kwargs": about["kwargs"], "seqlens": [tokens + 2]}
        ]
        new["noise_seed"] = None
    if "text" in about:
        text = about["text"]
        new["texts"] = [{**text, "gen_ids": [text["gen_ids"]], "context": about["clean_contexts"]["gen"]}]
    for name in [n for n in tensors if not n.startswith(("op", "img", "txt"))]:
        tensors[f"{'txt' if 'gen_ids' in name or 'logits' in name else 'img'}0.{name}"] = tensors.pop(name)
    return new
