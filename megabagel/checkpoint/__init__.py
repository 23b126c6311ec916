"""Checkpoints that any grid can read: sharded tensors by megatron.core.dist_checkpointing, JSON for the rest."""
