"""How the model is spread over ranks: process groups, tensor-parallel linears, context parallelism, pipeline stages.

megatron-core does the groups, linears, schedules and the distributed optimizer; this room adapts the model to it.
Import `megabagel.runtime.cpu_backend` and call `install()` before megatron on a machine without CUDA.
"""
