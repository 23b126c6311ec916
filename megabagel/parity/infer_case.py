"""An `infer_*` case: contexts, pictures and texts of the official generation code, through the real engine.

Ops, contexts and settings come from the case; rows of the cache, positions, masks, branches and steps are ours.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from megabagel.checkpoint.hf.files import TensorFiles
from megabagel.config.load import override
from megabagel.config.schema import (
    Config,
    DataConfig,
    ParallelConfig,
    ResizeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)
from megabagel.errors import UserError
from megabagel.inference.build import build_runner, from_published
from megabagel.inference.contexts import Context, ImageContent
from megabagel.inference.decoding import TextSettings, probabilities
from megabagel.inference.engine import Engine
from megabagel.inference.pictures import from_latent, latent_tokens, patches_of, resized
from megabagel.inference.programs import (
    Canvas,
    DrawSettings,
    Program,
    Session,
    Special,
    Step,
    Token,
    View,
    decode,
    denoise,
    official_noise,
    prefill,
)
from megabagel.model.vae_flux import FluxCodec
from megabagel.parallel.attention import choose_attention
from megabagel.parallel.mesh import Mesh
from megabagel.parity.case import Case, model_config, open_case
from megabagel.parity.comparisons import Gates, Row, compare
from megabagel.parity.prim_case import case_autoencoder
from megabagel.sampling.guidance import Guidance
from megabagel.sequence.grid import grid_ids
from megabagel.sequence.patches import unpatchify
from megabagel.sequence.sample import LATENT, VIT

CACHE_TOKENS = 8192


def infer_config(case: Case, overrides: list[str], ranks: int) -> Config:
    """The config of an `infer_*` case. Raises UserError for overrides that do not fit."""
    model = model_config(case)
    data = DataConfig(
        min_tokens=1,
        max_tokens=512,
        sources=(SourceConfig(case.name, str(case.path), "text"),),
        vae_resize=ResizeConfig(max_size=model.latent_grid * model.latent_stride, min_size=model.latent_stride),
        vit_resize=ResizeConfig(max_size=model.vit.grid * model.vit.patch, min_size=model.vit.patch),
    )
    run, grid, train = RunConfig(dir="runs/parity", resume="none"), ParallelConfig(), TrainConfig(packs_per_step=ranks)
    config = override(Config(run=run, model=model, parallel=grid, data=data, train=train), overrides, str(case.path))
    return replace(config, parallel=replace(config.parallel, sp=False))


def compare_inference(case: Case, config: Config, mesh: Mesh, gates: Gates) -> list[Row]:
    """Run every sub-case and compare everything. Rows are whole on rank 0; called on all ranks."""
    wanted = set(case.weights)
    fill = from_published(TensorFiles(case.path, keep=wanted.__contains__))
    whole = mesh.world.size == mesh.dp.size
    runner = build_runner(config, None if whole else mesh, choose_attention(config), fill, CACHE_TOKENS)
    ids = case.entry("special_tokens")
    special = Special(ids["bos_token_id"], ids["eos_token_id"], ids["start_of_image"], ids["end_of_image"])
    engine = Engine(runner, special)
    codec = None
    if "vae_weights_from" in case.about:
        codec = case_autoencoder(open_case(case.path.with_name(case.about["vae_weights_from"])))
    rows: list[Row] = []
    for tag, about in case.entry("sub_cases").items():
        rows += _SubCase(tag, about, case, engine, config, mesh, gates, codec).rows()
    return rows


@dataclass
class _SubCase:
    """One entry of `sub_cases`, run op by op."""

    tag: str
    about: dict[str, Any]
    case: Case
    engine: Engine
    config: Config
    mesh: Mesh
    gates: Gates
    codec: FluxCodec | None

    def rows(self) -> list[Row]:
        """All comparisons."""
        self.tensors, self.found = self.case.tensors(self.tag), []
        self.about = _of_new_format(self.about, self.tensors, self.case.about)
        count = max(len(op["kv_before"]) for op in self.about["ops"])
        self.sessions = [self.engine.session() for _ in range(count)]
        self.pictures: list[np.ndarray] = []
        self.context_of: list[dict[Context, Context]] = [{(): ()} for _ in range(count)]
        waiting = list(enumerate(self.about["images"]))
        for number, op in enumerate(self.about["ops"]):
            # A picture that a later op shows is made before that op.
            while waiting and self._feeds_back(number, op) and len(self.pictures) <= self._shown(number):
                self._image(*waiting.pop(0))
            self._op(number, op)
        for number, image in waiting:
            self._image(number, image)
        for number, text in enumerate(self.about["texts"]):
            self._text(number, text)
        for session in self.sessions:
            session.close()
        return self.found

    def _feeds_back(self, number: int, op: dict[str, Any]) -> bool:
        return op["op"] == "vae" and f"op{number}.pixels_u8" in self.tensors and number > 0

    def _shown(self, number: int) -> int:
        """Pictures that were fed back up to an op."""
        return sum(self._feeds_back(n, op) for n, op in enumerate(self.about["ops"][:number]))

    def _check(self, name: str, ours: Any, exact: bool = False) -> None:
        """Compare with the case's entry, if it has one."""
        if name in self.tensors:
            theirs = self.tensors[name]
            gate = self.gates.exact if exact else self.gates.block
            self.found.append(compare(f"{self.tag}/{name}", ours, theirs, gate))

    def _fact(self, name: str, ours: Any, theirs: Any) -> None:
        """Compare numbers of the JSON file."""
        if theirs is not None:
            row = compare(f"{self.tag}/{name}", torch.as_tensor(ours), torch.as_tensor(theirs), self.gates.exact)
            self.found.append(row)

    def _op(self, number: int, op: dict[str, Any]) -> None:
        """Append an op to its context in every sequence of the batch."""
        keys = []
        for index, session in enumerate(self.sessions):
            theirs = tuple(op["on"])
            on = self.context_of[index][theirs]
            content = self._content(number, op, index)
            log = session.log
            self._fact(f"op{number} position[{index}]", log.position(on), op["positions_per_sequence"][index])
            self._fact(f"op{number} kv_before[{index}]", log.tokens(on), op["kv_before"][index])
            context = log.append(on, content)
            self.context_of[index][*theirs, number] = context
            self._fact(f"op{number} kv_after[{index}]", log.tokens(context), op["kv_after"][index])
            self.engine.run(prefill(session, [context]), session, ends_session=False)
            slots = log.slots[context[-1]]
            assert slots is not None
            keys.append(slots)
        self._cache(f"op{number}.", np.concatenate(keys))

    def _content(self, number: int, op: dict[str, Any], index: int) -> Any:
        model, tensors, name = self.config.model, self.tensors, f"op{number}"
        if op["op"] == "text":
            ids = op["ids_with_bos_eos"][index]
            return replace_ids(self.sessions[index].special.text(ids[1:-1]), ids)
        if op["op"] == "vit":
            rows, cols, at = self._vit_grid(number, op, index)
            ids = tensors[f"{name}.vit_position_ids"]
            mine = grid_ids(rows, cols, model.vit.grid, model.interpolate_pos)
            self._fact(f"{name}.vit_position_ids[{index}]", mine, ids[at : at + rows * cols])
            values = tensors.get(f"{name}.vit_tokens")
            if values is None:
                values = tensors[f"{name}.vit_tokens_u8"].float() / 255 * 2 - 1
                values = (tensors[f"{name}.vit_tokens_u8"].float() / 255 - 0.5) / 0.5
            values = values[at : at + rows * cols]
            self._pixels(number, op, values)
            return ImageContent(VIT, rows, cols, values)
        rows, cols = op["hw"][index]
        at = sum(r * c for r, c in op["hw"][:index])
        mine = grid_ids(rows, cols, model.latent_grid, model.interpolate_pos)
        self._fact(
            f"{name}.latent_position_ids[{index}]", mine, tensors[f"{name}.latent_position_ids"][at:][: len(mine)]
        )
        latent = tensors[f"{name}.latent"][index]
        if self.codec is not None and f"{name}.pixels_u8" in tensors:
            latent = self._encoded(name)
        cells = latent[:, : rows * model.latent_patch, : cols * model.latent_patch]
        return ImageContent(LATENT, rows, cols, latent_tokens(cells, model.latent_patch))

    def _vit_grid(self, number: int, op: dict[str, Any], index: int) -> tuple[int, int, int]:
        """(rows, columns, first patch) of a sequence's image, read off its grid ids."""
        sizes = op["vit_token_seqlens"]
        at, size = sum(sizes[:index]), sizes[index]
        ids = self.tensors[f"op{number}.vit_position_ids"][at : at + size].tolist()
        side, stretched = self.config.model.vit.grid, self.config.model.interpolate_pos
        for rows in range(1, size + 1):
            if size % rows == 0 and max(rows, size // rows) <= side:
                if grid_ids(rows, size // rows, side, stretched).tolist() == ids:
                    return rows, size // rows, at
        raise UserError(f"{self.case.path}: {self.tag}/op{number}.vit_position_ids are those of no image")

    def _encoded(self, name: str) -> Tensor:
        """The codec's latent of an op's pixels with the case's posterior noise, compared with the case's."""
        assert self.codec is not None
        levels = self.tensors[f"{name}.pixels_u8"]
        pixels = (levels.float() / 255 - 0.5) / 0.5
        latent = self.codec.sample(self.codec.moments(pixels), self.tensors[f"{name}.posterior_eps"])
        self._check(f"{name}.latent", latent)
        if self._feeds_back(int(name.removeprefix("op")), {"op": "vae"}):
            shown = self.pictures[self._shown(int(name.removeprefix("op")))]
            self._check(f"{name}.pixels_u8", torch.from_numpy(shown).permute(2, 0, 1)[None], exact=True)
        return latent[0]

    def _pixels(self, number: int, op: dict[str, Any], patches: Tensor) -> None:
        """From the case's picture to patches by the resize rules, exact."""
        at = sum(o["op"] == "vit" for o in self.about["ops"][:number])
        picture = self.tensors.get(f"image{at}.uint8")
        if picture is None or "vit_transform" not in self.about:
            return
        model = self.config.model
        image = Image.fromarray(picture.numpy())
        for key, stride in (("vae_transform", None), ("vit_transform", None)):
            if key in self.about:
                most, least, stride = self.about[key]
                image = resized(image, ResizeConfig(most, least), stride)
        found = patches_of(image, model.vit.patch)
        self.found.append(compare(f"{self.tag}/op{number} patches of image{at}", found, patches, self.gates.exact))

    def _contexts(self, image: dict[str, Any], index: int) -> tuple[View, View, View]:
        """Main, text-free and image-free context of a picture; positions and lengths are compared."""
        session, named = self.sessions[index], self.context_of[index]
        views = []
        for key, prefix in (("gen", ""), ("cfg_text", "cfg_text_"), ("cfg_img", "cfg_img_")):
            view = session.view(named[tuple(image["contexts"][key])])
            if key == "cfg_text" and image.get("cfg_text_cache_is_none"):
                view = View(np.zeros(0, np.int64), image["cfg_text_position"][index])
            for fact, ours in (("kv_len", len(view.rows)), ("position", view.position)):
                theirs = image.get(prefix + fact)
                self._fact(f"{prefix}{fact}[{index}]", ours, theirs[index] if theirs else None)
            views.append(view)
        return views[0], views[1], views[2]

    def _image(self, number: int, image: dict[str, Any]) -> None:
        name, kwargs, model = f"img{number}", image["kwargs"], self.config.model
        settings = DrawSettings(
            kwargs["num_timesteps"],
            kwargs["timestep_shift"],
            Guidance(
                kwargs["cfg_text_scale"],
                kwargs["cfg_img_scale"],
                tuple(kwargs["cfg_interval"]),
                kwargs["cfg_renorm_type"],
                kwargs["cfg_renorm_min"],
            ),
            kwargs.get("enable_taylorseer", False),
        )
        ids, noise, at, canvases = (
            self.tensors[f"{name}.latent_position_ids"],
            self.tensors[f"{name}.init_noise"],
            0,
            [],
        )
        seeds = self.about.get("noise_seed")
        for index, length in enumerate(image["seqlens"]):
            mine = slice(at, at + length - 2)
            rows, cols = _grid_of(ids[mine], model.latent_grid, model.interpolate_pos)
            seed = seeds[number if len(image["seqlens"]) == 1 else index] if isinstance(seeds, list) else seeds
            if seed is not None and len(image["seqlens"]) == 1:
                drawn = official_noise(seed, length - 2, model.latent_dim)
                self.found.append(compare(f"{self.tag}/{name} seed rule", drawn, noise[mine], self.gates.exact))
            canvases.append(Canvas(rows, cols, noise[mine], *self._contexts(image, index)))
            at += length - 2
        steps, final = self._run(denoise(self.sessions[0], canvases, settings, joint=len(canvases) > 1))
        self._check(f"{name}.expect.final_tokens", torch.cat(final))
        self._steps(name, image, canvases, steps, settings)
        self._decoded(number, canvases, final)

    def _run(self, program: Program[Any]) -> tuple[list[Any], Any]:
        """Run a program of the first session; (its events, its result)."""
        request = self.engine.submit(program, self.sessions[0], need=0, ends_session=False)
        events: list[Any] = []
        while request.done is None:
            events += [event for _, event in self.engine.step()]
        if request.done.error:
            raise UserError(f"{self.case.path}: {self.tag}: {request.done.error}")
        return events[:-1], request.done.result

    def _steps(
        self, name: str, image: dict[str, Any], canvases: list[Canvas], steps: list[Step], settings: DrawSettings
    ) -> None:
        """States, velocities and branches of every step."""
        if not steps:
            return
        self._fact(f"{name} timesteps", [step.t for step in steps], image["timesteps"])
        scales = [settings.guidance.scales(step.t) for step in steps]
        self._fact(f"{name} scales", scales, image["scales"])
        self._check(f"{name}.expect.x_t", torch.stack([torch.cat(step.x_t) for step in steps]))
        self._check(f"{name}.expect.v_t", torch.stack([torch.cat(step.velocity) for step in steps]))
        for key, branch in (("v_main", "main"), ("v_text", "text_free"), ("v_img", "image_free")):
            at = image.get(f"{key}_steps")
            if f"{name}.expect.{key}" in self.tensors:
                chosen = steps if at is None else [steps[i] for i in at]
                found = [self._branch(step, branch, canvases) for step in chosen]
                self._check(f"{name}.expect.{key}", torch.stack(found))

    def _branch(self, step: Step, name: str, canvases: list[Canvas]) -> Tensor:
        """A branch's velocity at a step; one that guidance did not need is evaluated for the comparison alone."""
        if name in step.branches[0]:
            return torch.cat([one[name] for one in step.branches])
        alone = [
            replace(canvas, noise=x, main=getattr(canvas, name)) for canvas, x in zip(canvases, step.x_t, strict=True)
        ]
        return torch.cat(self._run(_velocity(self.sessions[0], alone, step.t))[1])

    def _decoded(self, number: int, canvases: list[Canvas], final: list[Tensor]) -> None:
        """Pixels of the pictures where the case has an autoencoder."""
        patch, name = self.config.model.latent_patch, f"img{number}"
        for canvas, tokens in zip(canvases, final, strict=True):
            latent = unpatchify(tokens, canvas.rows, canvas.cols, patch)
            self._check(f"{name}.expect.final_latent", latent[None])
            if self.codec is None:
                continue
            pixels = self.codec.decode(latent[None])
            self._check(f"{name}.expect.latent", latent[None])
            self._check(f"{name}.expect.decoded", pixels)
            self.pictures.append(from_latent(tokens, canvas.rows, canvas.cols, patch, self.codec))
            self._check(f"out{number}.uint8", torch.from_numpy(self.pictures[-1]), exact=True)

    def _text(self, number: int, text: dict[str, Any]) -> None:
        """Greedy texts; a sampled one is fed the case's ids, as only probabilities are its contract."""
        ids, logits, rows = [], [], []
        length = len(text["gen_ids"][0])
        for index, session in enumerate(self.sessions):
            context = self.context_of[index][tuple(text["context"])]
            self._fact(f"txt{number} kv_len[{index}]", session.log.tokens(context), text["kv_len"][index])
            self._fact(
                f"txt{number} first_position[{index}]", session.log.position(context), text["first_position"][index]
            )
            forced = text["gen_ids"][index][1:] if "temperature" in self.about or len(self.sessions) > 1 else []
            settings = TextSettings(max_new_tokens=length)
            own_rows = session.arena.take(length)
            session.arena.give_back(own_rows)  # decoding takes the same ones
            found, last = self._decode(index, context, settings, forced)
            ids.append([session.special.bos, *found][:length])
            logits.append(torch.stack(last))
            rows.append(np.concatenate([session.view(context).rows, own_rows]))
        self._check(
            f"txt{number}.expect.logits", _like(torch.stack(logits, 1), self.tensors.get(f"txt{number}.expect.logits"))
        )
        greedy = torch.stack([x.argmax(-1) for x in logits], 1)
        theirs = self.tensors.get(f"txt{number}.expect.gen_ids")
        if theirs is not None:
            self._check(f"txt{number}.expect.gen_ids", _like(torch.tensor(ids).T, theirs), exact=True)
        if "temperature" not in self.about:
            self._fact(f"txt{number} next_ids_last", greedy[-1], text.get("next_ids_last"))
        else:
            p = torch.stack([probabilities(x, self.about["temperature"]) for x in logits], 1)
            self._check(f"txt{number}.expect.probs", p)
        self._cache(f"txt{number}.expect.", np.concatenate(rows))

    def _decode(
        self, index: int, context: Context, settings: TextSettings, forced: list[int]
    ) -> tuple[list[int], list[Tensor]]:
        """(ids, logits after each token); the greedy choice is replaced by `forced` ids where there are any."""
        session = self.sessions[index]
        program = (
            _ForcedChoice(decode(session, context, settings), forced) if forced else decode(session, context, settings)
        )
        events, ids = self._run(program)  # type: ignore[arg-type]
        return ids, [event.logits_V.cpu() for event in events if isinstance(event, Token)]

    def _cache(self, prefix: str, rows: np.ndarray) -> None:
        """Keys and values of cache rows in the layers that the case has, whole on rank 0."""
        cache, where = self.engine.cache, torch.from_numpy(rows)
        names = [
            n
            for n in self.tensors
            if n.startswith(prefix) and n[len(prefix) :][:1] in "kv" and n[len(prefix) + 1 :].isdigit()
        ]
        for name in names:
            layer = int(name[len(prefix) + 1 :])
            pool = cache.keys if name[len(prefix)] == "k" else cache.values
            self._check(name, self._gathered(pool[layer].cpu()[where] if layer in pool else None))

    def _gathered(self, mine: Tensor | None) -> Tensor | None:
        """Heads of all tensor-parallel ranks of the stage that has the layer."""
        grid = self.mesh
        if grid.world.size == grid.dp.size:
            return mine
        place = (grid.cp.rank, grid.dp.rank, grid.tp.rank)
        everyone: list[Any] = [None] * grid.world.size
        dist.all_gather_object(everyone, (place, mine))
        found = sorted((tp, x) for (cp, dp, tp), x in everyone if cp == dp == 0 and x is not None)
        return torch.cat([x for _, x in found], 1)


def replace_ids(content: Any, ids: list[int]) -> Any:
    """The text exactly as the case has it; raises UserError where its delimiters are not bos and eos."""
    if list(content.ids) != list(ids):
        raise UserError(f"a text op of the case is {list(ids)}, expected bos, ids, eos: {list(content.ids)}")
    return content


def _velocity(session: Session, canvases: list[Canvas], t: float) -> Program[list[Tensor]]:
    """The plain velocity of every canvas's main context at its noise and timestep `t`."""
    from megabagel.inference.programs import _Drawing

    drawings = [_Drawing(session, canvas, taylorseer=False) for canvas in canvases]
    parts = tuple(p for d, c in zip(drawings, canvases, strict=True) for p in d.parts(c.noise, t, (False, False)))
    results = yield parts
    for drawing in drawings:
        drawing.close()
    return [result.velocities[0].cpu() for result in results]


class _ForcedChoice:
    """A decoding program whose tokens are given: it is told other logits than were found."""

    def __init__(self, program: Program[list[int]], ids: list[int]) -> None:
        self.program, self.ids, self.number = program, ids, 0
        self.true: Tensor | None = None

    def __next__(self) -> Any:
        return next(self.program)

    def send(self, results: list[Any]) -> Any:
        """Pass results on with the forced id as the likeliest; events keep the true logits."""
        if results:
            self.true = results[0].logits_QV[0]
            if self.number < len(self.ids):
                altered = torch.full_like(results[0].logits_QV, -torch.inf)
                altered[0, self.ids[self.number]] = 0
                results = [replace(results[0], logits_QV=altered)]
            self.number += 1
        found = self.program.send(results)
        return replace(found, logits_V=self.true) if isinstance(found, Token) else found

    def close(self) -> None:
        """End the program."""
        self.program.close()


def _grid_of(ids: Tensor, side: int, stretched: bool) -> tuple[int, int]:
    """Rows and columns of a latent image from its grid ids."""
    count = len(ids)
    for rows in range(1, count + 1):
        if count % rows == 0 and max(rows, count // rows) <= side:
            if grid_ids(rows, count // rows, side, stretched).tolist() == ids.tolist():
                return rows, count // rows
    raise UserError("latent_position_ids are those of no image")


def _like(ours: Tensor, theirs: Tensor | None) -> Tensor:
    """Ours [T, B, ...] without the batch where the case has none."""
    return ours[:, 0] if theirs is not None and theirs.dim() == ours.dim() - 1 else ours


def _of_new_format(about: dict[str, Any], tensors: dict[str, Tensor], case: dict[str, Any]) -> dict[str, Any]:
    """The first case of all, in the format of the later ones."""
    if "clean_contexts" not in about:
        return {"images": [], "texts": [], **about}
    ops, before = [], 0
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
