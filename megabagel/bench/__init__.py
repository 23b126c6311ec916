"""How fast a config trains on a grid, and where the time goes: `megabagel bench`."""
