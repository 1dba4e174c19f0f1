"""Times and memory of layers, steps and jobs under a load."""
