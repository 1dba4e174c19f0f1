"""Hostile input: random damage to every file that a user may pass."""
