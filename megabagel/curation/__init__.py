"""Curation: from web pages, pictures and videos to shards that train, by counted steps (docs/curation.md)."""
