"""Evaluation: what a trained model can do, in numbers."""
