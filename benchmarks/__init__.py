"""Measurements of the package, and of the cost model against real steps and published runs."""
