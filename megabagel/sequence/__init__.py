"""Token layout of a batch, computed in NumPy from sizes alone: no weights, process groups or devices.

items -> sample plan -> packing -> pack -> rank layout -> attention ranges, RoPE ids, loss targets, FLOP count
"""
