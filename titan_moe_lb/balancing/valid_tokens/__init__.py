"""Valid tokens of a batch, and the sequences that they form."""
