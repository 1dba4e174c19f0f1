"""What moves the bias that is added to the scores for the choice alone: one file a rule."""
