"""From shards to packed batches: documents, index, mixture, global plan, decoding, loading."""
