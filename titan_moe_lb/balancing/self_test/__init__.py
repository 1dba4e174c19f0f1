"""Self-test of a model's balancing: every loss reaches its gate, every bias moves and is read."""
