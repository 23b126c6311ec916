"""Synthetic data sets, and packing of a folder of captioned images into shards."""
