"""Loading: reads, decodes and packs this rank's share of every step, in worker processes or a thread."""
