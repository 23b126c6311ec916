"""Generalized-causal attention over packed samples: the mask as integers, a dense reference, and the engines."""
