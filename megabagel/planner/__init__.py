"""Before a launch: does it fit, how fast will it be, and do all ranks agree on shapes and shards.

`estimate` is the model of memory and time, `search` goes through the legal grids, `dryrun` builds the real thing
without its tensors.
"""
