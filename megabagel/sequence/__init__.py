"""What is known of a batch before any tensor exists: from sizes alone, in NumPy, without ranks or devices.

items -> sample plan -> packing -> pack -> rank layout -> mask integers, RoPE ids, loss targets, FLOP count
"""
