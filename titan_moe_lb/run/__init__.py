"""Processes of a job, their console output, and the end of a run."""
