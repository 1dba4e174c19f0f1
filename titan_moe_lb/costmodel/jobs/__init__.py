"""Sizes of a job, read from the job itself. The one part that needs torch."""
