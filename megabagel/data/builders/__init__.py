"""Builders of data sets: drawn ones of the project's own, and shards from a folder of images."""
