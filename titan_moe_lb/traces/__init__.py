"""The files that a run leaves, and what is read from them. Imports no torch."""
