"""The numbers of a step, and where they go."""
