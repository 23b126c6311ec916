"""Benchmarks as data and pure functions; `SUITES` lists them by name."""
