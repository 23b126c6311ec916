"""Keyed randomness: a draw depends on what it is for, and on nothing else."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product

import numpy as np

from megabagel.sequence.keys import SampleKey, generator, seed64, uniform

KEY = SampleKey(seed=1, source="pairs", sample=2, epoch=3)


def test_every_part_of_a_key_counts():
    keys = [
        SampleKey(seed, source, sample, epoch)
        for seed, source, sample, epoch in product((1, 2, 12), ("a", "b", "a1"), (0, 1, 11), (0, 1, 11))
    ]
    index = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (10,)]
    labels = [(key, purpose, *i) for key in keys for purpose in ("noise", "timestep", "drop") for i in index]
    assert len({key.seed64(*rest) for key, *rest in labels}) == len(labels)
    assert len({key.generator(*rest).random() for key, *rest in labels}) == len(labels)


def test_labels_do_not_run_together_and_their_type_counts():
    seeds = [seed64("a", "bc"), seed64("ab", "c"), seed64("abc"), seed64(1, 23), seed64(12, 3), seed64(123)]
    seeds += [seed64("123"), seed64("1", 23)]
    assert len(set(seeds)) == len(seeds)


def test_the_same_key_gives_the_same_stream_whatever_was_drawn_before():
    first = KEY.generator("timestep", 0).standard_normal(3)
    KEY.generator("timestep", 1).standard_normal(1000)
    assert np.array_equal(KEY.generator("timestep", 0).standard_normal(3), first)
    assert np.array_equal(generator(1, "pairs", 2, 3, "timestep", 0).standard_normal(3), first)


def test_uniform_is_the_first_draw_of_the_generator_bit_for_bit():
    """Also between other draws, and in several threads at once."""
    keys = [replace(KEY, sample=sample, epoch=epoch) for sample in range(400) for epoch in range(3)]
    expected = [key.generator("drop", 7).random() for key in keys]
    assert [key.uniform("drop", 7) for key in keys] == expected
    assert uniform(1, "mixture", 5) == generator(1, "mixture", 5).random()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [key.uniform("drop", 7) for key in keys], range(8)):
            assert found == expected


def test_seeds_are_signed_64_bit_and_use_all_of_them():
    seeds = np.array([replace(KEY, sample=i).seed64("noise", 0) for i in range(2000)], dtype=np.int64)  # or overflow
    bits = (seeds[:, None] >> np.arange(64)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.06


def test_another_process_draws_the_same():
    """Python's own hash differs between processes; keys may not."""
    program = (
        "from megabagel.sequence.keys import SampleKey as K; k = K(1, 'pairs', 2, 3); "
        "print(k.seed64('noise', 4, 5), repr(float(k.generator('drop', 6).random())))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert told.stdout.split() == [str(KEY.seed64("noise", 4, 5)), repr(float(KEY.generator("drop", 6).random()))]
