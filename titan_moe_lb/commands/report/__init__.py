"""One HTML page about a run, from its trace alone."""
