"""Every task of the schema has drawn documents for the benchmark."""

from typing import get_args

from megabagel.bench.synthetic import _ITEMS
from megabagel.data.documents import Task


def test_no_task_is_left_out() -> None:
    assert set(_ITEMS) == set(get_args(Task))
