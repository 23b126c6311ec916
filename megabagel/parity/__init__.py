"""Proof of equality with the official model: golden cases through the program's own path, in numbers."""
