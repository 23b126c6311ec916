"""Importing this module is the costly part of being a rank: seconds for torch and megatron-core (see warm_jobs.py)."""
# ruff: noqa: E402, F401 (imported for its cost, in this order)

from megabagel.runtime import cpu_backend

cpu_backend.install()

import megabagel.train.run
