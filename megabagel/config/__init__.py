"""The whole run as one typed tree: schema, loading, and the rules between fields."""
