"""Checkpoint of a job's start, checks that it is complete, and the order of its experts."""
