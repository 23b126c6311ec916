"""Texts of an `infer_*` case: ids, logits, probabilities and the cache rows they leave."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabagel.inference.contexts import Context
from megabagel.inference.decoding import TextSettings, probabilities
from megabagel.inference.programs import (
    Program,
    Token,
    decode,
)
from megabagel.parity.infer_state import SubCase


def compare_text(sub: SubCase, number: int, text: dict[str, Any]) -> None:
    """Greedy texts; a sampled one is fed the case's ids, as only probabilities are its contract."""
    ids, logits, rows = [], [], []
    length = len(text["gen_ids"][0])
    for index, session in enumerate(sub.sessions):
        context = sub.context_of[index][tuple(text["context"])]
        sub.fact(f"txt{number} kv_len[{index}]", session.log.tokens(context), text["kv_len"][index])
        sub.fact(f"txt{number} first_position[{index}]", session.log.position(context), text["first_position"][index])
        forced = text["gen_ids"][index][1:] if "temperature" in sub.about or len(sub.sessions) > 1 else []
        settings = TextSettings(max_new_tokens=length)
        own_rows = session.arena.take(length)
        session.arena.give_back(own_rows)  # decoding takes the same ones
        found, last = _decode(sub, index, context, settings, forced)
        logits.append(torch.stack(last))
        # Forced ids are compared with what the logits choose; a sampled text chooses nothing itsub.
        chosen = found if "temperature" in sub.about else logits[-1].argmax(-1).tolist()
        ids.append([session.special.bos, *chosen][:length])
        rows.append(np.concatenate([session.view(context).rows, own_rows]))
    sub.check(
        f"txt{number}.expect.logits", _like(torch.stack(logits, 1), sub.tensors.get(f"txt{number}.expect.logits"))
    )
    greedy = torch.stack([x.argmax(-1) for x in logits], 1)
    theirs = sub.tensors.get(f"txt{number}.expect.gen_ids")
    if theirs is not None:
        sub.check(f"txt{number}.expect.gen_ids", _like(torch.tensor(ids).T, theirs), exact=True)
    if "temperature" not in sub.about:
        sub.fact(f"txt{number} next_ids_last", greedy[-1], text.get("next_ids_last"))
    else:
        p = torch.stack([probabilities(x, sub.about["temperature"]) for x in logits], 1)
        sub.check(f"txt{number}.expect.probs", p)
    sub.compare_cache(f"txt{number}.expect.", np.concatenate(rows))


def _decode(
    sub: SubCase, index: int, context: Context, settings: TextSettings, forced: list[int]
) -> tuple[list[int], list[Tensor]]:
    """(ids, logits after each token); the greedy choice is replaced by `forced` ids where there are any."""
    session = sub.sessions[index]
    if len(sub.sessions) > 1:  # in a batch the released code goes on after a sequence's eos
        session = replace(session, special=replace(session.special, eos=-1))
    program = (
        _ForcedChoice(decode(session, context, settings), forced) if forced else decode(session, context, settings)
    )
    events, ids = sub.run(program)  # type: ignore[arg-type]
    return ids, [event.logits_V.cpu() for event in events if isinstance(event, Token)]


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
        return replace(found, logits_V=self.true) if isinstance(found, Token) and self.true is not None else found

    def close(self) -> None:
        """End the program."""
        self.program.close()


def _like(ours: Tensor, theirs: Tensor | None) -> Tensor:
    """Ours [T, B, ...] without the batch where the case has none."""
    return ours[:, 0] if theirs is not None and theirs.dim() == ours.dim() - 1 else ours
