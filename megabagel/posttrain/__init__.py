"""Post-training on a model's own pictures (SRUM): generate, find regions, judge, write training records, show them."""
