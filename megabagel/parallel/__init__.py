"""Parallelism: process groups, tensor-parallel linears, context-parallel attention, pipeline stages, model inputs.

megatron-core supplies groups, linears, schedules and the distributed optimizer; this package adapts the model to them.
On a machine without CUDA, call `megabagel.runtime.cpu_backend.install()` before the first import of megatron.
"""
