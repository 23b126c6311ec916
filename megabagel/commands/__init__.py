"""Commands of `megabagel`, one file per group: their options, and the functions they call.

Other rooms are imported when a command runs.
"""
