"""Generation on held-out samples and the metrics over it."""
