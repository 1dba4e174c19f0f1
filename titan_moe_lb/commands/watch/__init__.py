"""A live run in the terminal."""
