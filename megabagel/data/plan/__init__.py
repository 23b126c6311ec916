"""The global plan: assignment of samples to packs and of packs to steps, for the whole job."""
