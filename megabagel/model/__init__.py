"""The Mixture-of-Transformers in plain torch: layers, ViT, VAE, heads and losses, independent of parallelism.

Linears and row exchanges come from a `LayerFactory` when the model is built, attention from `StageInputs` with every
batch. With the factory `SingleDevice` the whole model runs on one device without megatron-core.
"""
