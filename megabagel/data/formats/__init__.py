"""Shard formats: tar, parquet and JSONL files in the released layouts, and the records in them."""
