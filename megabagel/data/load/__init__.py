"""Loading: a rank's share of every step, read, decoded and laid out in worker processes."""
