"""Inference: KV cache, contexts, text decoding, flow sampling with guidance, and an engine that batches requests.

Sizes, rows and masks of a forward pass are decided in NumPy (`contexts`, `segments`); `runner` is the only file that
turns them into tensors and calls the training model.
"""
