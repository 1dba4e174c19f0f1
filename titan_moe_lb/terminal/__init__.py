"""Parts of the terminal output that several commands share."""
