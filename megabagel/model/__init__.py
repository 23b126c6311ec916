"""What is computed: the Mixture-of-Transformers, its towers, codecs and heads, in plain torch.

Nothing here knows a rank. Linears, row exchanges and attention are handed in: by a `LayerFactory` when the model is
built and by `StageInputs` for every batch. With `SingleDevice` the whole model runs on one device without megatron.
"""
