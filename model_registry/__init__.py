"""One package per model: its registry entry, config functions and defaults with their sources."""
