"""Which attention engine a config gets, and what is said of it."""

import logging
from dataclasses import replace
from importlib.util import find_spec

import pytest

from megabagel.config.schema import Config
from megabagel.errors import UserError
from tests.parallel.scenario import base_config


def config(name: str) -> Config:
    return replace(base_config(), parallel=replace(base_config().parallel, attention=name))


@pytest.mark.parametrize(
    ("asked", "engine", "why"),
    [("auto", "host", "this is a CPU"), ("host", "host", "asked for"), ("flex", "flex", "asked for")],
)
def test_choice_is_logged(caplog: pytest.LogCaptureFixture, asked: str, engine: str, why: str) -> None:
    from megabagel.parallel.attention import choose_attention

    with caplog.at_level(logging.INFO):
        found = choose_attention(config(asked))
    assert (found.name, found.has_backward) == (engine, engine == "host")
    assert caplog.messages == [f"attention engine: {engine} ({why})"]


def test_kernels_need_a_gpu_or_the_interpreter() -> None:
    from megabagel.parallel.attention import choose_attention

    lacking = "there is no GPU" if find_spec("triton") else "Triton is not installed"
    with pytest.raises(UserError, match=rf"parallel\.attention=triton: {lacking}.*Use auto"):
        choose_attention(config("triton"))
