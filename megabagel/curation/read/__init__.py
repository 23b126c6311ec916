"""Readers: files of an input become partitions, and a partition a stream of drafts."""
