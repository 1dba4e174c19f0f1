"""From a config to processes, and what they print."""
