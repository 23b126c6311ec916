"""The roll call: who belongs together trains together, and everybody learns who does not."""

import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from megabagel.config.schema import Config
from megabagel.errors import UserError
from megabagel.runtime import identity, rendezvous
from megabagel.runtime.identity import Identity, facts, first_difference
from megabagel.runtime.rendezvous import _listening, _RollCall
from megabagel.runtime.signed_store import SECRET
from tests.support.cli_harness import as_rank, pairs, tiny_run
from tests.support.config_tree import change
from tests.support.rank_pool import RankPool

JOB = Identity("7", "1", "0")


def answers(*calls: tuple[int, int, Identity, Mapping[str, str], str], seconds: float = 20.0) -> list[str]:
    """What the roll call comes to for each (rank, size, identity, facts, secret), all at one store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = [""] * len(calls)

    def call(number: int, rank: int, size: int, who: Identity, told: Mapping[str, str], secret: str) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, timeout=timedelta(seconds=30))
        roll = _RollCall(store, ".".join(who), who, rank, size)
        for signed in (roll.common, roll.roll):
            signed._secret = secret.encode()
        try:
            roll.answer(told, seconds)
        except UserError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=call, args=(number, *one)) for number, one in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_of_one_kind_form_a_group() -> None:
    same = {"train.lr": "1"}
    assert answers(*((rank, 3, JOB, dict(same), "s") for rank in range(3))) == [""] * 3


def test_the_first_key_that_differs_is_named_on_every_rank_at_once() -> None:
    told = [{"a": "1", "train.lr": "1", "torch": "2"}] * 2 + [{"a": "1", "train.lr": "2", "torch": "3"}] * 2
    began = time.monotonic()
    found = answers(*((rank, 4, JOB, told[rank], "s") for rank in range(4)))
    assert time.monotonic() - began < 10 and len(set(found)) == 1
    assert found[0].startswith("train.lr = 2 on rank 2 (") and "but 1 on rank 0 (" in found[0]
    assert "and 1 more ranks differ" in found[0]


def test_a_fact_that_a_rank_does_not_have() -> None:
    found = first_difference({0: {"a": "1"}, 1: {"a": "1", "b": "2"}}, {0: "x", 1: "y"})
    assert found is not None and found.startswith("b = 2 on rank 1 (y), but absent on rank 0 (x)")


def test_two_steps_of_one_allocation_are_two_groups() -> None:
    """Even at one port: what the ranks of one step write, those of the other do not read."""
    other = Identity("7", "2", "0")
    calls = [(rank, 2, who, {"step": who.step}, "s") for who in (JOB, other) for rank in range(2)]
    assert answers(*calls) == [""] * 4


@pytest.mark.parametrize(
    ("other", "secret", "says"),
    [
        (Identity("7", "2", "0"), "s", "A process came as rank 1 of job 7, step 2, start 0, but this is job 7, step 1"),
        (Identity("7", "1", "1"), "s", "A process came as rank 1 of job 7, step 1, start 1, but this is job 7, step 1"),
        (Identity("8", "1", "0"), "t", f"A process came as rank 1 with another {SECRET}"),
        (JOB, "t", f"A process came as rank 1 with another {SECRET}"),
    ],
)
def test_a_rank_of_another_job_is_named(other: Identity, secret: str, says: str) -> None:
    mine, _ = answers((0, 2, JOB, {}, "s"), (1, 2, other, {}, secret), seconds=2)
    assert "rank 1 of 2 did not start within run.start_timeout=2 s" in mine and says in mine


def test_a_second_process_of_one_rank_is_refused() -> None:
    calls = [(rank, 2, JOB, {}, "s") for rank in (0, 1, 1)]
    with mock.patch.object(rendezvous, "_who", lambda: f"host, process {threading.get_ident()}"):
        found = answers(*calls)
    assert found.count("") == 2 and found[0] == ""
    assert any("rank 1 of 2 is host, process" in text and "one process per rank" in text for text in found)


def test_facts_hold_settings_code_and_libraries() -> None:
    one, other = facts(Config()), facts(change(Config(), {"train.seed": 3}))
    assert {key for key in one if one[key] != other[key]} == {"train.seed"}
    assert one["numpy"] and len(one["megabagel source"]) == 16 and facts(None).keys() < one.keys()


def test_the_store_listens_on_its_own_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def address(name: str) -> str:
        with _listening(name, 0) as listener:
            return str(listener.getsockname()[0])

    assert address("127.0.0.1") == address("localhost") == "127.0.0.1"
    monkeypatch.setattr(rendezvous, "several_hosts", lambda: True)
    assert address("127.0.0.1") == "127.0.0.1" and address("localhost") == "0.0.0.0"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("tiny"), pairs(6))


def differing(words: list[str], own: str, place: dict[str, str], store: str) -> tuple[int, str, str]:
    """A rank of a job in the pool; rank 1 has settings or software of its own."""
    mine = [own] if dist.get_rank() == 1 and "=" in own else []
    software = identity._software() | ({own: "another"} if dist.get_rank() == 1 and "=" not in own else {})
    with mock.patch.object(identity, "_software", lambda: software):
        return as_rank([*words, *mine], place, None, store)


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ("train.lr=0.5", "train.lr = 0.5 on rank 1"),
        ("train.seed=9", "train.seed = 9 on rank 1"),
        ("megabagel source", "megabagel source = another on rank 1"),
        ("numpy", "numpy = another on rank 1"),
    ],
)
def test_a_job_whose_ranks_differ_ends_before_it_trains(
    ranks: RankPool, tiny: Path, tmp_path: Path, own: str, says: str
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), SECRET: "x"}
    words = [str(tiny), f"run.dir={tmp_path}/run"]
    for code, err, _ in ranks.run(2, differing, words, own, place, f"{tmp_path}/store"):
        assert code == 2 and says in err and "on rank 0 (" in err and "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_the_secret_is_that_of_the_environment() -> None:
    """The tests above set secrets by hand: a store without one takes the environment's."""
    with mock.patch.dict(os.environ, {SECRET: "e"}):
        assert _RollCall(dist.HashStore(), "g", JOB, 0, 1).roll._secret == b"e"
