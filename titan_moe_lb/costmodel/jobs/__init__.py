"""Sizes of a job, read from its config and model. Only this part needs torch."""
