"""Formats of shards: tar, parquet and JSONL in the released layouts, and the records in them."""
