"""The index of a source: every sample's key, roles and sizes, and where its bytes lie."""
