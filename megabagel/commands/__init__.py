"""The commands of `megabagel`, a file per group: their options, and what they call.

Rooms are imported when a command runs.
"""
