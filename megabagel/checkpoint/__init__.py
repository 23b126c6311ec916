"""Checkpoints that any grid can read: sharded tensors through megatron.core.dist_checkpointing, JSON for the rest."""
