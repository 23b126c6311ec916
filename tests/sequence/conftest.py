"""Fixtures of this room."""

from tests.support.parity_files import golden

__all__ = ["golden"]
