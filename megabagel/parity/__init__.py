"""Parity with the official model: golden cases run through the production code path and compared in numbers."""
