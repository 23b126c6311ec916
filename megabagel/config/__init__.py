"""Configuration of a run as one typed tree: schema, loading of YAML and overrides, checks."""
