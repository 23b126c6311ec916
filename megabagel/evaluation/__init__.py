"""Evaluation: suites that measure the abilities of a trained model."""
