"""Data pipeline from shards to packed batches: documents, index, mixture, global plan, decoding, loading."""
