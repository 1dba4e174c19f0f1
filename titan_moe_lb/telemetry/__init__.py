"""Metrics of a step, and their way to the sinks, the console and the trace."""
