"""Metrics of a step, and their output to sinks, console and trace."""
