"""The index of a source: key, roles, sizes and byte locations of every sample."""
