"""Training of a small VQGAN on one's own clips."""
