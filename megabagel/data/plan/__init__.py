"""The global plan: which samples form which pack of which step, for the whole job."""
