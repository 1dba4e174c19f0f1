"""Comparison of the cost model with published measurements."""
