"""Training of BAGEL-like Mixture-of-Transformers on any grid of tensor, pipeline, context and data parallelism."""
