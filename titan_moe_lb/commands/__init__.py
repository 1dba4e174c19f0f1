"""Commands that read what a run leaves, or plan one. Nothing imports them but ``cli``."""
