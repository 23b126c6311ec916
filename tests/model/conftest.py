"""Fixtures of this room."""

from tests.parity_files import golden

__all__ = ["golden"]
