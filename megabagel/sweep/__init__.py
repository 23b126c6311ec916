"""Sweeps: training runs that differ in a few settings, repeated over seeds and compared in pairs."""
