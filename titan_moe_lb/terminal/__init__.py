"""Terminal output and folder locks that several commands share."""
