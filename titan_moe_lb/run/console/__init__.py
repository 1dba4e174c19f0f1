"""Output of a run: a few lines for the user, and a full log file of each rank."""
