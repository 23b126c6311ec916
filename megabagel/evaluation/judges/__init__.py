"""Judges: programs, models and recorded answers behind one interface."""
