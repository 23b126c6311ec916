"""Data sets that the project draws itself."""
