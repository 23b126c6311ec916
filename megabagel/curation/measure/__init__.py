"""Measures of pictures, texts and frames: NumPy and Pillow, no model, no torch."""
