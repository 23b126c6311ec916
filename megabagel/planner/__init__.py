"""Planner: memory and step-time estimates before a launch, and a dry run of the whole job in one process.

`estimate` is the model of memory and time, `search` estimates every legal grid, `dryrun` builds real ranks on the meta
device and compares their shapes and shards. None of them needs a GPU. docs/planner.md has the formulas.
"""
