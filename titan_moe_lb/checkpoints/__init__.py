"""Checkpoints: which one a job starts from, whether it is whole, and the order of its experts."""
