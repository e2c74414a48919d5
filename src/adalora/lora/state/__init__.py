"""A training state, and the files that it lies in."""
