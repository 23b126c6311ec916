"""Rewards of generated pictures as weights of the flow loss (SRUM section 3): regions, pixel map, latent tokens."""
