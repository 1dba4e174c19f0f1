"""What a run says: a few lines for the user, everything in a log file of each rank."""
