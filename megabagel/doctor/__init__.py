"""Diagnosis of a machine for training, as printed by `megabagel doctor`: what is present, absent or unusable."""
