"""Importing this module is the costly part of being a rank: torch and megatron-core.

The process that workers are forked from imports it once (see pool.py), so that each of them starts warm.
"""
# ruff: noqa: E402, F401 (the order of imports and their cost are the point of this file)

import os

os.environ["OMP_NUM_THREADS"] = "1"  # ranks share a few cores; read when torch loads
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve

import torch

from megabagel.runtime import cpu_backend

cpu_backend.install()

import megatron.core.dist_checkpointing
import megatron.core.distributed
import megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules
from megatron.core import parallel_state

torch.set_num_threads(1)

__all__ = ["parallel_state", "torch"]
